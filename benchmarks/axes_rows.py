"""The rows of ``axes.py``: shapes of experts under one budget, what was measured of each, and the tables made of it.

N experts of I neurons become K experts of W neurons.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from quality_tables import table

# How a result is corrected, and what its column is called; ``default`` is what ``convert`` does by itself.
FITS: Mapping[str, str] = {"none": "unfitted", "down": "`down`", "default": "default"}
# The planner's choice may have so much more excess than the best shape of its case.
TARGET = 0.05


class Shape(NamedTuple):
    """Number and width of the routed experts."""

    experts: int
    width: int

    @property
    def neurons(self) -> int:
        """Neurons of all experts of a layer, which its routed parameters are proportional to."""
        return self.experts * self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One conversion and what it did to the model.

    Attributes:
        model: Name of the model.
        share: Share of the routed parameters that was asked for.
        experts: K.
        width: W.
        fit: One of ``FITS``.
        absent: Domain that calibration lacked and that alone was measured; ``""`` if none.
        ratio: Perplexity over that of the source, and its 95 % interval.
        output_error: Mean over the layers of the relative error of the routed output on calibration text.
        cpu_seconds: User and system time of the conversion.
        tokens: Calibration tokens.
    """

    model: str
    share: float
    experts: int
    width: int
    fit: str
    absent: str
    ratio: tuple[float, float, float]
    output_error: float
    cpu_seconds: float
    tokens: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What no two rows have in common."""
        return self.model, self.share, self.experts, self.width, self.fit, self.absent

    @property
    def case(self) -> tuple[str, float, str]:
        """What rows are compared within."""
        return self.model, self.share, self.absent

    @property
    def shape(self) -> Shape:
        """K and W."""
        return Shape(self.experts, self.width)

    @property
    def excess(self) -> float:
        """How far the ratio is above 1."""
        return self.ratio[0] - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the planner predicts for the shapes of a case, by which it chooses one.

    Attributes:
        model: Name of the model.
        share: Share of the routed parameters that was asked for.
        absent: Domain that calibration lacked; ``""`` if none.
        candidates: K, W and the predicted error of every shape.
        cpu_seconds: User and system time that the prediction took.
    """

    model: str
    share: float
    absent: str
    candidates: tuple[tuple[int, int, float], ...]
    cpu_seconds: float

    @property
    def case(self) -> tuple[str, float, str]:
        """What it was predicted for."""
        return self.model, self.share, self.absent

    @property
    def chosen(self) -> Shape:
        """The shape of least predicted error."""
        experts, width, _ = min(self.candidates, key=lambda candidate: candidate[2])
        return Shape(experts, width)


class Rows:
    """Rows in the order in which they were measured, saved one by one so that an interrupted run can resume.

    Args:
        file: JSON file; it may not exist yet.
        settings: What all rows have in common; ``None`` takes those of the file.

    Raises:
        SystemExit: If the file holds rows of other settings.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any] | None = None) -> None:
        self._file, self.settings = file, dict(settings or {})
        self.sources: dict[str, Shape] = {}
        self.predictions: dict[tuple[str, float, str], Prediction] = {}
        self.rows: dict[tuple[Any, ...], Row] = {}
        if not file.exists():
            return
        content = json.loads(file.read_text("utf-8"))
        if settings is not None and content["settings"] != self.settings:
            raise SystemExit(f"{file} was measured with {content['settings']}; choose another --json file.")
        self.settings = content["settings"]
        self.sources = {name: Shape(*shape) for name, shape in content["sources"].items()}
        for values in content["predictions"]:
            found = Prediction(**values | {"candidates": tuple(map(tuple, values["candidates"]))})
            self.predictions[found.case] = found
        for values in content["rows"]:
            row = Row(**values | {"ratio": tuple(values["ratio"])})
            self.rows[row.key] = row

    def add(self, row: Row) -> None:
        """Adds a row and saves all."""
        self.rows[row.key] = row
        self._save()

    def predict(self, prediction: Prediction) -> None:
        """Adds a prediction and saves all."""
        self.predictions[prediction.case] = prediction
        self._save()

    def _save(self) -> None:
        """Writes the file; what was saved before stays whole if this is interrupted."""
        parts = [f' "settings": {json.dumps(self.settings)}', f' "sources": {json.dumps(self.sources)}']
        for name, found in (("predictions", self.predictions), ("rows", self.rows)):
            lines = ",\n".join(f"  {json.dumps(asdict(one))}" for one in found.values())
            parts.append(f' "{name}": [\n{lines}\n ]')
        partial = self._file.with_suffix(".partial.json")
        partial.write_text("{\n" + ",\n".join(parts) + "\n}\n", "utf-8")
        os.replace(partial, self._file)


def document(files: Sequence[Rows]) -> Iterator[str]:
    """The section of the README: how far the planner's choices are from the best, then every model and share."""
    rows = [row for file in files for row in file.rows.values()]
    sources = {name: shape for file in files for name, shape in file.sources.items()}
    chosen = {case: found.chosen for file in files for case, found in file.predictions.items()}
    if chosen:
        yield planner_table(rows, chosen)
    for model, share in dict.fromkeys((row.model, row.share) for row in rows):
        yield f"#### {model}, {100 * share:g} % of the routed parameters"
        yield shape_table([row for row in rows if (row.model, row.share) == (model, share)], sources[model], chosen)


def best_of(rows: Sequence[Row], like: Row) -> Row:
    """The row of least excess in the case and with the fit of another."""
    return min((row for row in rows if (row.case, row.fit) == (like.case, like.fit)), key=lambda row: row.excess)


def shape_table(rows: Sequence[Row], source: Shape, chosen: Mapping[tuple[str, float, str], Shape]) -> str:
    """All shapes of a model under one budget; the best of each column is bold, and the planner's choice marked."""
    found = {(row.shape, row.absent, row.fit): row for row in rows}
    columns = [
        (absent, fit)
        for absent in sorted({row.absent for row in rows})
        for fit in FITS
        if any((row.absent, row.fit) == (absent, fit) for row in rows)
    ]
    cells = []
    for shape in sorted({row.shape for row in rows}, key=lambda shape: (-shape.experts, shape.width)):
        cells.append([title(shape, source), f"{100 * shape.neurons / source.neurons:.1f} %"])
        for column in columns:
            row = found.get((shape, *column))
            mark = " †" if row is not None and chosen.get(row.case) == shape else ""
            cells[-1].append("" if row is None else ratio_cell(row, is_best=best_of(rows, row) is row) + mark)
    return table(["experts x width", "kept", *(column_title(*column) for column in columns)], cells)


def title(shape: Shape, source: Shape) -> str:
    """A shape as tables show it."""
    kind = "width only, " if shape.experts == source.experts else ""
    kind = "experts only, " if shape.width == source.width else kind
    return f"{kind}{shape.experts} x {shape.width}"


def column_title(absent: str, fit: str) -> str:
    """A column as tables show it."""
    return f"{absent}, calibrated without it: {FITS[fit]}" if absent else FITS[fit]


def ratio_cell(row: Row, *, is_best: bool) -> str:
    """A ratio with its interval."""
    shown = f"{row.ratio[0]:.3f}"
    return f"{f'**{shown}**' if is_best else shown} ({row.ratio[1]:.3f} to {row.ratio[2]:.3f})"


def planner_table(rows: Sequence[Row], chosen: Mapping[tuple[str, float, str], Shape]) -> str:
    """For every case and fit, the planner's choice next to the best of the shapes that were measured."""
    names = ["case", "fit", "planner's choice", "best", "shapes", "excess over the best excess"]
    cells = []
    for row in rows:
        if chosen.get(row.case) != row.shape:
            continue
        best = best_of(rows, row)
        count = sum((one.case, one.fit) == (row.case, row.fit) for one in rows)
        case = f"{row.model}, {100 * row.share:g} %{f', {row.absent} absent' if row.absent else ''}"
        shown = [f"{one.experts} x {one.width}: {one.ratio[0]:.3f}" for one in (row, best)]
        cells.append([case, FITS[row.fit], *shown, str(count), percent_above(row.excess, best.excess)])
    return table(names, cells)


def percent_above(excess: float, best: float) -> str:
    """How much more excess a choice has than the best, and whether that is too much."""
    if best <= 0:
        return "the best has none"
    more = excess / best - 1
    return f"{100 * more:+.1f} %{'' if more <= TARGET else ', too much'}"
