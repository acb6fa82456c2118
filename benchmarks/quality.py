"""Measures what recipes do to models: perplexity, choices, agreement with the source, loops, and what they cost.

Run: python benchmarks/quality.py --model [NAME=]FOLDER ... --calibration TEXT ... --text FILE --choices FILE
     --json FILE [--keep 0.5 0.75] [--recipes NAME ...] [--seeds 42 43 44] [--samples N] [--records N] [--loops N]
     [--absent]
     python benchmarks/quality.py --tables --json FILE ... [--figure FILE]

Every recipe converts every model once per seed, on the same calibration text; a seed changes which documents are drawn
and every random choice of the method. Models run as in ``hcsmoe evaluate``, once per conversion. Intervals are 95 %, by
bootstrap over records, and all comparisons are paired: same records, same questions. CPU time is that of the conversion
alone, without the measure of quality at its end, in a process with one thread that has loaded all libraries; HC-SMoE is
timed on as many sequences as each recipe takes, for comparison.

``--calibration`` takes what ``hcsmoe convert --calibration`` takes; several texts are compared with each other.
``--absent`` leaves each domain of the calibration file out in turn, and measures on that domain. Rows that ``--json``
already holds for the same settings are not measured again. ``--tables`` prints what was measured as Markdown;
``--figure`` draws quality against CPU time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from quality_recipes import ABSENT, RECIPES, REFERENCE
from quality_rows import reference_time
from quality_scores import HeldOut, Scores
from quality_statistics import change, ratio
from quality_store import Key, Store
from quality_tables import document

from hcsmoe_hub.hub.open import open_source
from hcsmoe_hub.model.source_model import read_model
from hcsmoe_hub.report import REPORT_FILE


class Model(NamedTuple):
    """A model to reduce.

    Attributes:
        name: Its name in the tables.
        folder: Its checkpoint.
        experts: Experts of its layers.
    """

    name: str
    folder: Path
    experts: int


def converted(model: Model, key: Key, text: str, output: Path, sequences: int | None = None) -> dict[str, Any]:
    """Converts in a process of its own.

    Args:
        model: The source.
        key: Names the recipe, the seed and the number of experts.
        text: Calibration text.
        output: Folder of the result.
        sequences: Number of calibration sequences, ``None`` for the recipe's own.

    Returns:
        Costs, number and length of the calibration sequences, and the mean output error of the layers; or ``refused``.
    """
    recipe = RECIPES[key.recipe]
    request = {
        "source": str(model.folder),
        "output": str(output),
        "experts": key.experts,
        "method": {**recipe.choices, "seed": key.seed},
        "calibration": {"dataset": text, "samples": sequences, "seed": key.seed},
        "text": recipe.text,
    }
    command = [sys.executable, "-P", str(Path(__file__).with_name("quality_convert.py"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, input=json.dumps(request), env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "refused" in figures:
        return figures
    report = json.loads((output / REPORT_FILE).read_text("utf-8"))
    found = {name: report["calibration"][name] for name in ("sequences", "sequence_length")}
    return figures | found | {"output_error": statistics.fmean(layer["output_error"] for layer in report["layers"])}


def compared(result: Scores, source: Scores, domains: list[str]) -> dict[str, Any]:
    """Figures of a result next to those of its source."""
    names = np.array(domains)
    masks = {name: names == name for name in sorted(set(domains))}
    is_judged = len(result.right) > 1
    return {
        "ratio": ratio(result.losses, source.losses, source.tokens),
        "domains": {
            name: ratio(result.losses[mask], source.losses[mask], source.tokens[mask]) for name, mask in masks.items()
        },
        "accuracy": float(result.right.mean()) if is_judged else None,
        "accuracy_change": change(result.right, source.right) if is_judged else None,
        "top_1_agreement": float(result.matches(source).sum() / source.tokens.sum()),
        "loop_rate": result.loop_rate,
    }


class Bench:
    """Measures row after row.

    Args:
        wanted: The command line.
        store: Where rows go.
    """

    def __init__(self, wanted: argparse.Namespace, store: Store) -> None:
        self._wanted, self._store = wanted, store
        self._sources: dict[tuple[str, str], tuple[HeldOut, Scores]] = {}

    def source(self, model: Model, only: str) -> tuple[HeldOut, Scores]:
        """Held-out text of all domains, or of one, and what the source does on it."""
        if (model.name, only) not in self._sources:
            wanted = self._wanted
            if only:
                found = HeldOut(wanted.text, None, count=wanted.records, only=only)
            else:
                found = HeldOut(wanted.text, wanted.choices, count=wanted.records, loops=wanted.loops)
            scores = found.score(model.folder)
            self._sources[model.name, only] = found, scores
            key = Key(model.name, model.experts, "source", 0, "")
            if not only and key not in self._store.rows:
                figures = {
                    "perplexity": float(np.exp(scores.losses.sum() / scores.tokens.sum())),
                    "accuracy": float(scores.right.mean()) if len(scores.right) else None,
                    "loop_rate": scores.loop_rate,
                }
                arrays = {"losses": scores.losses, "tokens": scores.tokens, "right": scores.right}
                self._store.add(key, figures, arrays | {"domains": np.array(found.domains)})
        return self._sources[model.name, only]

    def measure(self, model: Model, key: Key, text: str) -> None:
        """Converts, scores and stores, unless the row is there."""
        if key in self._store.rows:
            return
        # The row of the source holds what all others are compared with.
        self.source(model, "")
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "result"
            figures = converted(model, key, text, output, self._wanted.samples)
            if "refused" in figures:
                self._store.add(key, figures, {})
                print(f"{' '.join(map(str, key))}: refused: {figures['refused']}", flush=True)
                return
            held_out, source = self.source(model, key.absent)
            scores = held_out.score(output)
        figures |= compared(scores, source, held_out.domains)
        arrays = {"losses": scores.losses, "matches": scores.matches(source), "right": scores.right}
        self._store.add(key, figures, arrays)
        shown = f"ratio {figures['ratio'].ratio:.4f}, {figures['cpu_seconds']:.1f} CPU s"
        print(f"{' '.join(map(str, key))}: {shown}", flush=True)
        if not key.absent:
            self._time_reference(model, key, text, figures["sequences"])

    def _time_reference(self, model: Model, key: Key, text: str, sequences: int) -> None:
        """Times the reference on as many sequences, unless that is known."""
        if reference_time(self._store, key, sequences) is not None:
            return
        with tempfile.TemporaryDirectory() as scratch:
            reference = key._replace(recipe=REFERENCE)
            figures = converted(model, reference, text, Path(scratch) / "result", sequences)
        self._store.add(key._replace(recipe=f"time/{sequences}"), figures, {})


def rows(wanted: argparse.Namespace, model: Model, folder: Path) -> Iterator[tuple[Key, str]]:
    """Every row that is asked for, and its calibration text; filtered files go to a folder."""
    for experts in (round(model.experts * share) for share in wanted.keep):
        for text in wanted.calibration:
            place, name = Path(text), label(text)
            absent = domains_of(place) if wanted.absent else [""]
            for seed in wanted.seeds:
                for recipe in wanted.recipes:
                    for domain in absent:
                        key = Key(model.name, experts, recipe, seed, name, domain)
                        yield key, str(without(place, domain, folder)) if domain else text


def label(text: str) -> str:
    """Calibration text as tables show it: files without their folders."""
    named = (part.partition("=") for part in text.split(","))
    return ",".join((Path(name).name if Path(name).exists() else name) + sign + share for name, sign, share in named)


def domains_of(file: Path) -> list[str]:
    """Domains of the records of a file, in the order of their names."""
    return sorted({json.loads(line)["domain"] for line in file.read_text("utf-8").splitlines()})


def without(file: Path, domain: str, folder: Path) -> Path:
    """A file with the records of all domains but one."""
    target = folder / f"without-{domain}.jsonl"
    lines = file.read_text("utf-8").splitlines(keepends=True)
    target.write_text("".join(line for line in lines if json.loads(line)["domain"] != domain), "utf-8")
    return target


def opened(named: str) -> Model:
    """A model by its folder, or by ``NAME=FOLDER``."""
    name, _, folder = named.rpartition("=")
    path = Path(folder)
    return Model(name or path.name, path, read_model(open_source(str(path))).settings.experts)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", nargs="+", default=[], help="folders of checkpoints, or NAME=FOLDER")
    parser.add_argument("--calibration", nargs="+", help="calibration text; several are compared")
    parser.add_argument("--text", type=Path, help="held-out text")
    parser.add_argument("--choices", type=Path, help="multiple-choice questions")
    parser.add_argument("--json", type=Path, nargs="+", required=True, help="where the rows are kept")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5], help="shares of the experts to keep")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), help="recipes to measure; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--samples", type=int, help="calibration sequences; by default those of convert")
    parser.add_argument("--records", type=int, help="records of each file; all by default")
    parser.add_argument("--loops", type=int, default=0, help="prompts to continue greedily, for the rate of loops")
    parser.add_argument("--absent", action="store_true", help="leave each domain out of calibration in turn")
    parser.add_argument("--tables", action="store_true", help="measure nothing, print what --json holds")
    parser.add_argument("--figure", type=Path, help="with --tables: image of quality against CPU time")
    wanted = parser.parse_args()
    lacks = [name for name in ("model", "calibration", "text", "choices") if not getattr(wanted, name)]
    if not wanted.tables and (lacks or len(wanted.json) > 1):
        parser.error(f"needs one --json, and: {', '.join(f'--{name}' for name in lacks)}")
    wanted.recipes = wanted.recipes or list(ABSENT if wanted.absent else RECIPES)
    return wanted


def main() -> None:
    wanted = parse()
    if wanted.tables:
        stores = [Store(file) for file in wanted.json]
        print("\n\n".join(document(stores)))
        if wanted.figure:
            # Matplotlib is an extra.
            from quality_figure import draw

            draw(stores, wanted.figure)
        return
    files = {name: getattr(wanted, name).name for name in ("text", "choices")}
    settings = {name: getattr(wanted, name) for name in ("samples", "records", "loops")}
    bench = Bench(wanted, Store(wanted.json[0], settings | files))
    for model in map(opened, wanted.model):
        with tempfile.TemporaryDirectory() as folder:
            for key, text in rows(wanted, model, Path(folder)):
                bench.measure(model, key, text)


if __name__ == "__main__":
    main()
