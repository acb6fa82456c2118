"""Measures the quality of results of different recipes: perplexity, choices, agreement with the source, loops.

Run: python benchmarks/quality.py --model FOLDER [FOLDER ...] --calibration FILE --text FILE --choices FILE
     [--keep 0.5 0.75] [--samples N] [--length N] [--records N] [--loops N] [--seeds 42 43] [--only WORD ...]
     [--json FILE]

Every recipe converts every model once per seed, on the same calibration text; a seed changes which documents are drawn
and every random choice of the method. All figures come from ``hcsmoe_hub.evaluation``, as those of ``hcsmoe evaluate``
do. ``--records`` takes that many evenly spaced records of each file. Rows that ``--json`` already holds for the same
settings are not measured again.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hcsmoe_hub import CalibrationOptions, ConvertOptions, HcsmoeError, MethodOptions, Preset, convert
from hcsmoe_hub.evaluation.evaluate import evaluate
from hcsmoe_hub.evaluation.options import EvaluateOptions
from hcsmoe_hub.hub.open import open_source
from hcsmoe_hub.model.source_model import read_model
from hcsmoe_hub.options import (
    Align,
    Clustering,
    Distance,
    Dominant,
    Layout,
    Merge,
    Propagate,
    Refit,
    RouterPolicy,
    Saliency,
)

SALIENT = MethodOptions(
    clustering=Clustering.SINGLE_SHOT,
    distance=Distance.EUCLIDEAN,
    dominant=Dominant.SALIENCY,
    align=Align.ACTIVATION,
    merge=Merge.SALIENCY,
)
RECONSTRUCTION = MethodOptions(preset=Preset.REAP, saliency=Saliency.RECONSTRUCTION)
REFIT = MethodOptions(preset=Preset.REFIT)
# Published methods; the first two keep all router rows, as the papers do.
BASELINES: Mapping[str, MethodOptions] = {
    "HC-SMoE, full router": MethodOptions(preset=Preset.HC_SMOE, layout=Layout.FULL),
    "M-SMoE, full router": MethodOptions(preset=Preset.M_SMOE, layout=Layout.FULL),
    "HC-SMoE": MethodOptions(preset=Preset.HC_SMOE),
    "random groups": MethodOptions(clustering=Clustering.RANDOM),
    "F-prune": MethodOptions(preset=Preset.REAP, saliency=Saliency.FREQUENCY),
    "S-prune": MethodOptions(preset=Preset.REAP, saliency=Saliency.ROUTING_SCORE),
    "REAP": MethodOptions(preset=Preset.REAP),
    "reconstruction": RECONSTRUCTION,
}
RECIPES: Mapping[str, MethodOptions] = {
    **BASELINES,
    "HC-SMoE, router fit": MethodOptions(preset=Preset.HC_SMOE, router=RouterPolicy.FIT),
    "HC-SMoE, aligned": MethodOptions(align=Align.ACTIVATION),
    "around salient experts": SALIENT,
    "REAP + down": replace(REFIT, refit=Refit.DOWN),
    "HC-SMoE, aligned + experts": MethodOptions(align=Align.ACTIVATION, refit=Refit.EXPERTS),
    "around salient experts + experts": replace(SALIENT, refit=Refit.EXPERTS),
    "reconstruction + experts": replace(RECONSTRUCTION, refit=Refit.EXPERTS),
    "REAP, router fit + experts": replace(REFIT, refit=Refit.EXPERTS, router=RouterPolicy.FIT),
    "REAP + experts, original states": replace(REFIT, refit=Refit.EXPERTS, propagate=Propagate.ORIGINAL),
    "REAP + experts, merged states": replace(REFIT, refit=Refit.EXPERTS, propagate=Propagate.MERGED),
    "refit (default)": REFIT,
    "refit, blocks": replace(REFIT, refit=Refit.BLOCKS),
}


HEAD = """| recipe | perplexity ratio | choices | top-1 agreement | loops | output error | seconds |
|---|---|---|---|---|---|---|"""


def thinned(file: Path, records: int | None, folder: Path) -> Path:
    """A file with evenly spaced lines of another; the other file itself for all lines."""
    lines = file.read_text("utf-8").splitlines()
    if records is None or records >= len(lines):
        return file
    chosen = [lines[number * len(lines) // records] for number in range(records)]
    target = folder / file.name
    target.write_text("\n".join(chosen) + "\n", "utf-8")
    return target


def measure(model: Path, experts: int, method: MethodOptions, wanted: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Converts and evaluates; a refusal becomes the row's only figure."""
    with tempfile.TemporaryDirectory() as scratch:
        options = ConvertOptions(
            experts=experts,
            method=replace(method, seed=seed),
            calibration=CalibrationOptions(
                dataset=str(wanted.calibration), samples=wanted.samples, sequence_length=wanted.length, seed=seed
            ),
            output=Path(scratch) / "result",
        )
        start = time.perf_counter()
        try:
            report = convert(model, options)
        except HcsmoeError as error:
            return {"refused": error.message}
        seconds = time.perf_counter() - start
        assert options.output is not None
        alone = evaluated(options.output, wanted)
        compared = EvaluateOptions(perplexity=wanted.text, output=Path(scratch) / "agreement.json")
        agreement = evaluate(options.output, replace(compared, base=model))[0]["measures"]["agreement"]
    before = evaluated(model, wanted)
    return {
        "perplexity": alone["perplexity"],
        "ratio": alone["perplexity"] / before["perplexity"],
        "base_perplexity": before["perplexity"],
        "accuracy": alone["accuracy"],
        "base_accuracy": before["accuracy"],
        "top_1_agreement": agreement["model"]["overall"]["top1_agreement"],
        "loop_rate": alone["loop_rate"],
        "base_loop_rate": before["loop_rate"],
        "output_error": statistics.fmean(layer.output_error for layer in report.layers),
        "seconds": round(seconds, 1),
    }


def evaluated(model: Path, wanted: argparse.Namespace) -> dict[str, float | None]:
    """Figures of one model alone; measured once per source, since they do not depend on the recipe."""
    if model not in wanted.known:
        with tempfile.TemporaryDirectory() as scratch:
            asked = EvaluateOptions(
                perplexity=wanted.text,
                choices=wanted.choices,
                generate=wanted.loops,
                output=Path(scratch) / "figures.json",
            )
            measures = evaluate(model, asked)[0]["measures"]
        figures = {
            "perplexity": measures["perplexity"]["model"]["overall"]["perplexity"],
            "accuracy": measures["choices"]["model"]["overall"]["accuracy"],
            "loop_rate": measures["loops"]["model"]["overall"]["loop_rate"] if wanted.loops else None,
        }
        if model not in wanted.model:
            return figures
        wanted.known[model] = figures
    known: dict[str, float | None] = wanted.known[model]
    return known


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, nargs="+", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--choices", type=Path, required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5], help="shares of the experts to keep")
    parser.add_argument("--samples", type=int, help="calibration sequences, by default those of convert")
    parser.add_argument("--length", type=int, help="tokens per calibration sequence, by default those of convert")
    parser.add_argument("--records", type=int, help="records of each file; all by default")
    parser.add_argument("--loops", type=int, default=0, help="prompts to continue greedily, for the rate of loops")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--only", nargs="+", default=list(RECIPES), choices=list(RECIPES), help="recipes to measure")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--recorded", action="store_true", help="measure nothing, show what --json holds")
    return parser.parse_args(namespace=argparse.Namespace(known={}))


def main() -> None:
    wanted = parse()
    record = Record(wanted)
    with tempfile.TemporaryDirectory() as folder:
        wanted.text = thinned(wanted.text, wanted.records, Path(folder))
        wanted.choices = thinned(wanted.choices, wanted.records, Path(folder))
        for model in wanted.model:
            before = read_model(open_source(str(model))).settings.experts
            for experts in (round(before * share) for share in wanted.keep):
                print(f"\n#### {model.name}, {before} to {experts} experts\n\n{HEAD}")
                ratios = dict[str, float]()
                for name in wanted.only:
                    runs = []
                    for seed in wanted.seeds:
                        found = record.run(model.name, experts, name, seed)
                        if found is None and wanted.recorded:
                            continue
                        if found is None:
                            found = measure(model, experts, RECIPES[name], wanted, seed)
                            record.add(model.name, experts, name, seed, found)
                        runs.append(found)
                    if runs and not ratios:
                        print(source_line(runs))
                    if runs:
                        print(line(name, runs), flush=True)
                        ratios |= ratio_of(name, runs)
                print(leaves(ratios))


class Record:
    """The measured rows, saved one by one so that an interrupted benchmark can resume."""

    def __init__(self, wanted: argparse.Namespace) -> None:
        self._file: Path | None = wanted.json
        settings = {key: getattr(wanted, key) for key in ("samples", "length", "records", "loops")}
        files = {name: getattr(wanted, name).name for name in ("calibration", "text", "choices")}
        self._content: dict[str, Any] = {"settings": settings | files, "rows": []}
        if self._file is not None and self._file.exists():
            found = json.loads(self._file.read_text("utf-8"))
            if found["settings"] != self._content["settings"]:
                raise SystemExit(f"{self._file} was measured with {found['settings']}; choose another --json file.")
            self._content = found

    def run(self, model: str, experts: int, recipe: str, seed: int) -> dict[str, Any] | None:
        """A row's figures, if they are known."""
        key = {"model": model, "experts": experts, "recipe": recipe, "seed": seed}
        return next((row["figures"] for row in self._content["rows"] if row.items() >= key.items()), None)

    def add(self, model: str, experts: int, recipe: str, seed: int, figures: dict[str, Any]) -> None:
        """Stores a row's figures."""
        row = {"model": model, "experts": experts, "recipe": recipe, "seed": seed, "figures": figures}
        self._content["rows"].append(row)
        if self._file is not None:
            self._file.write_text(json.dumps(self._content, indent=1) + "\n", "utf-8")


def line(name: str, runs: list[dict[str, Any]]) -> str:
    """One row of the table: means over the seeds, and the spread of the ratio if there are several."""
    refused = [run["refused"] for run in runs if "refused" in run]
    if refused:
        return f"| {name} | refused: {refused[0]} | | | | | |"
    ratios = [run["ratio"] for run in runs]
    spread = f" ({min(ratios):.3f} to {max(ratios):.3f})" if len(ratios) > 1 else ""
    shares = (share(runs, key) for key in ("accuracy", "top_1_agreement", "loop_rate", "output_error"))
    seconds = statistics.fmean(run["seconds"] for run in runs)
    return f"| {name} | {statistics.fmean(ratios):.3f}{spread} | {' | '.join(shares)} | {seconds:.1f} |"


def source_line(runs: list[dict[str, Any]]) -> str:
    """The source itself, as every row measures it."""
    known = [run for run in runs if "ratio" in run]
    figures = (share(known, key) for key in ("base_accuracy", "base_loop_rate")) if known else ("", "")
    return "| the source | 1 | {} | 100.0 % | {} | | |".format(*figures)


def ratio_of(name: str, runs: list[dict[str, Any]]) -> dict[str, float]:
    """Mean ratio of a recipe over the seeds, by its name; empty if it was refused."""
    ratios = [run["ratio"] for run in runs if "ratio" in run]
    return {name: statistics.fmean(ratios)} if ratios else {}


def leaves(ratios: Mapping[str, float]) -> str:
    """Excess perplexity (ratio minus one) of the refits relative to the best baseline."""
    baselines = {name: ratios[name] for name in BASELINES if name in ratios}
    fits = [name for name in ratios if name.startswith("refit")]
    if not baselines or not fits:
        return ""
    best = min(baselines, key=baselines.__getitem__)
    shares = [f"{name} leaves {(ratios[name] - 1) / (baselines[best] - 1):.2f}" for name in fits]
    return f"\nOf the excess of the best baseline, {best}: {', '.join(shares)}."


def share(runs: list[dict[str, Any]], key: str) -> str:
    """Mean of a share over the seeds, in percent."""
    known = [run[key] for run in runs if run[key] is not None]
    return f"{100 * statistics.fmean(known):.1f} %" if known else ""


if __name__ == "__main__":
    main()
