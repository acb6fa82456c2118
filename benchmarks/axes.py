"""Compares fewer experts with narrower ones, and mixes of both, at equal parameters.

Run: python benchmarks/axes.py --model [NAME=]FOLDER ... --calibration FILE --text FILE --json FILE
     [--keep 0.5 0.75] [--fits none down default] [--absent DOMAIN ...] [--samples N] [--sequence-length N]
     [--records N] [--characters N] [--planner]
     python benchmarks/axes.py --tables --json FILE ...

Every shape that ``--ratio`` chooses from is converted and measured on held-out text: with ``--fits none`` as
``convert --refit none``, with ``down`` as ``--refit down``, with ``default`` as ``convert`` without options. For every
domain of ``--absent``, each shape is also calibrated on the text without it, and measured on that domain alone.
``--planner`` measures nothing, but predicts as ``--ratio`` does, so that tables mark its choice. Everything runs in
this process: set ``OMP_NUM_THREADS=1`` to compare CPU times. The cheapest conversions come first, and the default ones
last. Rows that ``--json`` already holds for the same settings are not measured again. ``--tables`` prints what was
measured as Markdown.
"""

import argparse
import json
import resource
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from axes_rows import FITS, Prediction, Row, Rows, Shape, document
from quality import without
from quality_scores import HeldOut, Scores, spaced
from quality_statistics import ratio

from hcsmoe_hub import CalibrationOptions, ConversionPlan, ConvertOptions, MethodOptions, convert, plan
from hcsmoe_hub.events import EventLog, ignore
from hcsmoe_hub.hub.open import open_source
from hcsmoe_hub.model.source_model import read_model
from hcsmoe_hub.model.width import neurons_of
from hcsmoe_hub.options import Target
from hcsmoe_hub.pipeline.progress import Progress
from hcsmoe_hub.pipeline.run import load_tokens, observe
from hcsmoe_hub.planning.target import TargetPlan
from hcsmoe_hub.report import REPORT_FILE

# What a conversion with each fit takes, relative to an unfitted one; only the order of the rows depends on it.
COST = {"none": 1.0, "down": 1.5, "default": 10.0}


class Model(NamedTuple):
    """A model to reduce.

    Attributes:
        name: Its name in the tables.
        folder: Its checkpoint.
        shape: N and I.
        size: Neurons of all its layers times the hidden size.
    """

    name: str
    folder: Path
    shape: Shape
    size: int


class Wanted(NamedTuple):
    """A row to measure; without a shape, a prediction."""

    model: Model
    share: float
    absent: str
    fit: str = "none"
    shape: Shape | None = None

    @property
    def case(self) -> tuple[str, float, str]:
        """What it is compared within."""
        return self.model.name, self.share, self.absent


def cpu_seconds() -> float:
    """User and system time of this process so far, all threads together."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Bench:
    """Measures row after row.

    Args:
        wanted: The command line.
        rows: Where rows go.
        scratch: Folder for filtered text.
    """

    def __init__(self, wanted: argparse.Namespace, rows: Rows, scratch: Path) -> None:
        self._wanted, self._rows, self._scratch = wanted, rows, scratch
        self._sources: dict[tuple[str, str], tuple[HeldOut, Scores]] = {}
        self._texts: dict[str, tuple[Path, HeldOut]] = {}

    def text(self, absent: str) -> tuple[Path, HeldOut]:
        """Calibration text without a domain, and the beginnings of held-out records of that domain alone."""
        if absent not in self._texts:
            wanted, file = self._wanted, self._scratch / f"heldout-{absent}.jsonl"
            found = map(json.loads, wanted.text.read_text("utf-8").splitlines())
            records = spaced([record for record in found if absent in ("", record["domain"])], wanted.records)
            kept = [record | {"text": record["text"][: wanted.characters]} for record in records]
            file.write_text("".join(json.dumps(record) + "\n" for record in kept), "utf-8")
            calibration = without(wanted.calibration, absent, self._scratch) if absent else wanted.calibration
            self._texts[absent] = calibration, HeldOut(file, None, count=None)
        return self._texts[absent]

    def source(self, model: Model, absent: str) -> tuple[HeldOut, Scores]:
        """Held-out text, and what the source does on it."""
        if (model.name, absent) not in self._sources:
            held_out = self.text(absent)[1]
            self._sources[model.name, absent] = held_out, held_out.score(model.folder)
        return self._sources[model.name, absent]

    def measure(self, row: Wanted) -> None:
        """Converts, scores and stores."""
        held_out, source = self.source(row.model, row.absent)
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "result"
            begin = cpu_seconds()
            convert(str(row.model.folder), self.options(row, output))
            used = cpu_seconds() - begin
            scores = held_out.score(output)
            report = json.loads((output / REPORT_FILE).read_text("utf-8"))
        shape = Shape(report["experts"]["after"], report["experts"].get("width_after", row.model.shape.width))
        calibration = report["calibration"]
        found = Row(
            model=row.model.name,
            share=row.share,
            experts=shape.experts,
            width=shape.width,
            fit=row.fit,
            absent=row.absent,
            ratio=tuple(round(value, 5) for value in ratio(scores.losses, source.losses, source.tokens)),
            output_error=round(statistics.fmean(layer["output_error"] for layer in report["layers"]), 5),
            cpu_seconds=round(used, 1),
            tokens=calibration["sequences"] * calibration["sequence_length"],
        )
        self._rows.add(found)
        print(*found.key, f"ratio {found.ratio[0]:.4f}, {used:.1f} CPU s", flush=True)

    def predict(self, row: Wanted) -> None:
        """Predicts as ``--ratio`` does, and stores."""
        begin = cpu_seconds()
        planned = plan(str(row.model.folder), self.options(row, self._scratch / "result"))
        target = target_of(planned)
        if target.errors is None:
            progress = Progress(None, EventLog(ignore), torch.device("cpu"))
            target = target_of(observe(planned, load_tokens(planned, ignore), None, progress, ignore))
        assert target.errors is not None, "the model was observed"
        found = Prediction(
            model=row.model.name,
            share=row.share,
            absent=row.absent,
            candidates=tuple(
                (candidate.shape.experts, candidate.shape.width, round(error, 6))
                for candidate, error in zip(target.candidates, target.errors, strict=True)
            ),
            cpu_seconds=round(cpu_seconds() - begin, 1),
        )
        self._rows.predict(found)
        print(*found.case, "predicted", *found.candidates, flush=True)

    def options(self, row: Wanted, output: Path) -> ConvertOptions:
        """How a row is converted."""
        wanted, shape = self._wanted, row.shape
        numbers: dict[str, Any] = {"target": Target(ratio=row.share)}
        if shape is not None:
            is_narrower = shape.width < row.model.shape.width
            numbers = {"experts": shape.experts, "expert_width": shape.width if is_narrower else None}
        calibration = CalibrationOptions(
            dataset=str(self.text(row.absent)[0]), samples=wanted.samples, sequence_length=wanted.sequence_length
        )
        method = MethodOptions() if row.fit == "default" else MethodOptions(refit=row.fit)  # type: ignore[arg-type]
        return ConvertOptions(
            **numbers, method=method, calibration=calibration, output=output, measure=False, device="cpu"
        )


def target_of(planned: ConversionPlan) -> TargetPlan:
    """The shapes that meet the target of a plan."""
    assert planned.target is not None, "a target was asked for"
    return planned.target


def candidates(model: Model, share: float) -> list[Shape]:
    """The shapes that ``--ratio`` chooses from, most experts first."""
    found = target_of(plan(str(model.folder), ConvertOptions(target=Target(ratio=share), device="cpu"))).candidates
    return [Shape(candidate.shape.experts, candidate.shape.width) for candidate in found]


def missing(wanted: argparse.Namespace, rows: Rows, models: list[Model]) -> Iterator[Wanted]:
    """Every row that is asked for and not there, the cheapest first."""
    asked = [
        Wanted(model, share, absent, fit, shape)
        for model in models
        for share in wanted.keep
        for shape in candidates(model, share)
        for fit in wanted.fits
        for absent in ("", *wanted.absent)
    ]
    for row in sorted(asked, key=lambda row: (row.model.size * COST[row.fit], row.absent, row.share)):
        assert row.shape is not None, "rows are measured of shapes"
        if (row.model.name, row.share, *row.shape, row.fit, row.absent) not in rows.rows:
            yield row


def unpredicted(wanted: argparse.Namespace, rows: Rows, models: list[Model]) -> Iterator[Wanted]:
    """Every case without a prediction."""
    for model in sorted(models, key=lambda model: model.size):
        for absent in ("", *wanted.absent):
            for share in wanted.keep:
                if (model.name, share, absent) not in rows.predictions:
                    yield Wanted(model, share, absent)


def opened(named: str) -> Model:
    """A model by its folder, or by ``NAME=FOLDER``."""
    name, _, folder = named.rpartition("=")
    path = Path(folder)
    model = read_model(open_source(str(path)))
    shape = Shape(model.settings.experts, neurons_of(model))
    return Model(
        name or path.name, path, shape, shape.neurons * len(model.blocks) * model.skeleton.text_config.hidden_size
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", nargs="+", default=[], help="folders of checkpoints, or NAME=FOLDER")
    parser.add_argument("--calibration", type=Path, help="calibration text")
    parser.add_argument("--text", type=Path, help="held-out text")
    parser.add_argument("--json", type=Path, nargs="+", required=True, help="where the rows are kept")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.75], help="shares of the routed parameters")
    parser.add_argument("--fits", nargs="+", choices=list(FITS), default=list(FITS), help="all by default")
    parser.add_argument("--absent", nargs="+", default=[], help="domains to leave out of calibration, and to measure")
    parser.add_argument("--samples", type=int, help="calibration sequences; by default those of convert")
    parser.add_argument("--sequence-length", type=int, help="tokens of each; by default those of convert")
    parser.add_argument("--records", type=int, help="held-out records, evenly spaced; all by default")
    parser.add_argument("--characters", type=int, help="characters of each record; all by default")
    parser.add_argument("--planner", action="store_true", help="predict which shapes --ratio chooses")
    parser.add_argument("--tables", action="store_true", help="measure nothing, print what --json holds")
    wanted = parser.parse_args()
    lacks = [name for name in ("model", "calibration", "text") if not getattr(wanted, name)]
    if not wanted.tables and (lacks or len(wanted.json) > 1):
        parser.error(f"needs one --json, and: {', '.join(f'--{name}' for name in lacks)}")
    return wanted


def main() -> None:
    wanted = parse()
    if wanted.tables:
        print("\n\n".join(document([Rows(file) for file in wanted.json])))
        return
    settings = {name: getattr(wanted, name) for name in ("samples", "sequence_length", "records", "characters")}
    settings |= {name: getattr(wanted, name).name for name in ("calibration", "text")}
    rows = Rows(wanted.json[0], settings)
    models = [opened(named) for named in wanted.model]
    rows.sources |= {model.name: model.shape for model in models}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(wanted, rows, Path(scratch))
        if wanted.planner:
            for row in unpredicted(wanted, rows, models):
                bench.predict(row)
            return
        for row in missing(wanted, rows, models):
            bench.measure(row)


if __name__ == "__main__":
    main()
