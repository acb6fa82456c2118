"""Compares, at equal bytes, fewer experts with quantised weights: who is closer to the source, and where.

Run: python benchmarks/bytes.py --model FOLDER --calibration calib.jsonl --text heldout.jsonl --llama-cpp FOLDER
    --quantizer-python llama/bin/python --json bytes.json

Every point is a GGUF file that llama.cpp's quantiser wrote. Its tensors are decoded to float32, and that checkpoint is
measured by the code of ``hcsmoe evaluate``: one evaluator with one arithmetic for all points, on exactly the values
that the file holds. llama.cpp's own log-probabilities would add what its kernels round on the way, which differs
between CPUs and GPUs. Without a quantiser, the path from checkpoint to GGUF and back must give every bit of the
checkpoint again; the script checks that for each model.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bytes_gguf import HOW_TO_INSTALL, LlamaCpp, Stored, write_checkpoint
from quality_scores import HeldOut, Scores
from safetensors.torch import load_file

from hcsmoe_hub import CalibrationOptions, ConvertOptions, execute, plan
from hcsmoe_hub.hub.open import open_source
from hcsmoe_hub.model.source_model import read_model
from hcsmoe_hub.model.width import neurons_of

# Formats of the untouched model, and of converted ones. None of them needs an importance matrix.
UNTOUCHED = ("BF16", "Q8_0", "Q6_K", "Q4_K_M", "Q3_K_M", "Q2_K")
CONVERTED = ("BF16", "Q8_0", "Q4_K_M", "Q3_K_M")
# Formats of 32 weights per block fit these models as they are.
SHORT_BLOCKS = ("BF16", "Q8_0")


class Point(NamedTuple):
    """One measurement: a model of K experts of W neurons, in a format, with rows joined to 256 or not."""

    model: str
    experts: int
    width: int
    format: str
    joined: bool


class Bench:
    """Measures point after point, and keeps what is done.

    Args:
        wanted: The command line.
        llama: llama.cpp.
    """

    def __init__(self, wanted: argparse.Namespace, llama: LlamaCpp) -> None:
        self._wanted, self._llama = wanted, llama
        self._text = HeldOut(wanted.text, None, count=wanted.records)
        self._work: Path = wanted.work
        self._points: dict[Point, dict[str, Any]] = {}
        if wanted.json.exists():
            self._points = {
                Point(*(row[name] for name in Point._fields)): row
                for row in json.loads(wanted.json.read_text("utf-8"))["points"]
            }

    def measure(self, model: Path) -> None:
        """Measures the untouched model in all formats, and its conversions in some.

        Args:
            model: Folder of a Mixtral or a Qwen2-MoE.
        """
        source = read_model(open_source(str(model)))
        experts, width = source.settings.experts, neurons_of(source)
        self._measure_formats((model.name, experts, width), model, UNTOUCHED)
        for kept, kept_width in shapes(self._wanted, experts, width):
            converted = self._converted(model, kept, None if kept_width == width else kept_width)
            self._measure_formats((model.name, kept, kept_width), converted, CONVERTED)

    def _converted(self, model: Path, experts: int, width: int | None) -> Path:
        """A conversion with the default recipe; one that is there is used again."""
        output = self._work / f"{model.name}-{experts}e{'' if width is None else f'-{width}w'}"
        if not (output / "hcsmoe.json").exists():
            calibration = CalibrationOptions(dataset=str(self._wanted.calibration))
            options = ConvertOptions(
                experts=experts, expert_width=width, calibration=calibration, output=output, measure=False
            )
            execute(plan(str(model), options))
        return output

    def _measure_formats(self, shape: tuple[str, int, int], folder: Path, formats: tuple[str, ...]) -> None:
        """Measures what a folder holds, a model of a name, K and W, in several formats."""
        wanted = [point for format in formats for point in points(shape, format)]
        missing = [point for point in wanted if point not in self._points]
        if not missing:
            return
        config, tensors = json.loads((folder / "config.json").read_text("utf-8")), checkpoint_tensors(folder)
        shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
        # Formats that do not fit the rows fall back to the same types, and need not be measured twice.
        scored = dict[str, Scores]()
        with tempfile.TemporaryDirectory(dir=self._work) as scratch:
            plain, joined = Path(scratch) / "plain.gguf", Path(scratch) / "joined.gguf"
            self._llama.convert(folder, plain)
            is_short = self._llama.join_rows(plain, joined)
            for number, point in enumerate(point for point in missing if is_short or not point.joined):
                file = source = joined if point.joined else plain
                if point.format != "BF16":
                    file = Path(scratch) / f"{number}.gguf"
                    self._llama.quantize(source, file, point.format)
                stored = self._llama.read(file, config, shapes)
                if point.format == "BF16":
                    check_round_trip(stored, tensors)
                digest = stored.digest()
                if digest not in scored:
                    target = Path(scratch) / f"{number}"
                    write_checkpoint(stored, folder, target)
                    scored[digest] = self._text.score(target)
                self._add(point, stored, scored[digest])

    def _add(self, point: Point, stored: Stored, scores: Scores) -> None:
        domains = np.array(self._text.domains)
        masks = {"all": np.ones(len(domains), bool)} | {name: domains == name for name in sorted({*domains})}
        self._points[point] = {
            **point._asdict(),
            "tensor_bytes": stored.tensor_bytes,
            "parameters": stored.parameters,
            "bits_per_weight": round(8 * stored.tensor_bytes / stored.parameters, 3),
            "types": stored.types,
            "perplexity": {name: perplexity(scores, mask) for name, mask in masks.items()},
        }
        rows = list(self._points.values())
        text = {"file": self._wanted.text.name, "records": len(domains), "tokens": int(scores.tokens.sum())}
        self._wanted.json.write_text(json.dumps({"text": text, "points": rows}, indent=1) + "\n", "utf-8")
        print(*point, f"{self._points[point]['perplexity']['all']:.4f}", flush=True)


def perplexity(scores: Scores, mask: Any) -> float:
    """Perplexity on the records that a mask ``[R]`` takes."""
    return float(np.exp(scores.losses[mask].sum() / scores.tokens[mask].sum()))


def shapes(wanted: argparse.Namespace, experts: int, width: int) -> list[tuple[int, int]]:
    """K and W of the conversions: shares of the experts, and shapes as the command line gives them."""
    fewer = [(round(experts * share), width) for share in wanted.keep]
    return fewer + [(int(kept), int(of)) for kept, of in (shape.split("x") for shape in wanted.shapes)]


def points(shape: tuple[str, int, int], format: str) -> Iterator[Point]:
    """The points of a format: rows as they are, and, where a format wants rows of 256, joined."""
    yield Point(*shape, format, joined=False)
    if format not in SHORT_BLOCKS:
        yield Point(*shape, format, joined=True)


def checkpoint_tensors(folder: Path) -> dict[str, Any]:
    """All tensors of a checkpoint by their names."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def check_round_trip(stored: Stored, tensors: dict[str, Any]) -> None:
    """Checks that a GGUF file without quantisation gives the checkpoint again, bit by bit.

    Raises:
        SystemExit: If it does not.
    """
    for name, tensor in tensors.items():
        if not stored.tensors[name].equal(tensor.float()):
            raise SystemExit(f"{name} is not the same after the conversion to GGUF and back.")
    if len(stored.tensors) != len(tensors):
        raise SystemExit(f"the GGUF file holds {len(stored.tensors)} tensors, the checkpoint {len(tensors)}.")


def tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Tables in Markdown, one per model, smallest first."""
    for model in dict.fromkeys(row["model"] for row in rows):
        found = [row for row in rows if row["model"] == model]
        full = max((row["experts"], row["width"]) for row in found)
        base = next(row for row in found if (row["experts"], row["width"]) == full and row["format"] == "BF16")
        lines = [
            f"#### {model}",
            "",
            "| MB | checkpoint | format | bits per weight | types | perplexity ratio | worst domain |",
        ]
        lines.append("|---:|---|---|---:|---|---:|---|")
        for row in sorted(found, key=lambda row: row["tensor_bytes"]):
            ratios = {name: value / base["perplexity"][name] for name, value in row["perplexity"].items()}
            worst = max((name for name in ratios if name != "all"), key=ratios.__getitem__)
            shape = (row["experts"], row["width"])
            what = "untouched" if shape == full else f"{shape[0]} experts of {shape[1]}"
            cells = (
                f"{row['tensor_bytes'] / 1e6:.2f}",
                what,
                row["format"] + (", rows joined" if row["joined"] else ""),
                f"{row['bits_per_weight']:.2f}",
                ", ".join(f"{kind} {share:.0%}" for kind, share in row["types"].items() if share >= 0.005),
                f"{ratios['all']:.3f}",
                f"{worst} {ratios[worst]:.3f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
        yield "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else "",
        epilog=HOW_TO_INSTALL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, nargs="+", default=[], help="folders of Mixtral or Qwen2-MoE checkpoints")
    parser.add_argument("--calibration", type=Path, help="calibration text of the conversions")
    parser.add_argument("--text", type=Path, help="held-out text")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5], help="shares of the experts to keep")
    parser.add_argument("--shapes", nargs="*", default=[], help="more conversions, as experts x neurons: 8x96 6x128")
    parser.add_argument("--records", type=int, help="evenly spaced records of the text; all by default")
    parser.add_argument("--llama-cpp", type=Path, default=Path("llama.cpp"), help="folder of llama.cpp's converter")
    parser.add_argument("--quantizer-python", type=Path, default=Path("llama/bin/python"))
    parser.add_argument("--work", type=Path, default=Path("bytes"), help="folder for conversions, which are used again")
    parser.add_argument("--json", type=Path, required=True, help="where the points are kept")
    parser.add_argument("--tables", action="store_true", help="measure nothing, print what --json holds")
    wanted = parser.parse_args()
    lacks = [name for name in ("model", "calibration", "text") if not getattr(wanted, name)]
    if not wanted.tables and lacks:
        parser.error(f"needs {', '.join(f'--{name}' for name in lacks)}")
    return wanted


def main() -> None:
    wanted = parse()
    if not wanted.tables:
        wanted.work.mkdir(parents=True, exist_ok=True)
        bench = Bench(wanted, LlamaCpp(wanted.llama_cpp.resolve(), wanted.quantizer_python.absolute()))
        for model in wanted.model:
            bench.measure(model)
    print("\n\n".join(tables(json.loads(wanted.json.read_text("utf-8"))["points"])))


if __name__ == "__main__":
    main()
