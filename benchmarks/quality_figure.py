"""The frontier of quality against CPU time, as a figure."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from quality_recipes import RECIPES
from quality_rows import Measured, calibrations, cases, measured, source_key
from quality_store import Store

COLOURS = {"baseline": "0.55", "fit": "tab:blue", "other": "tab:orange"}
NAMES = {"baseline": "published methods", "fit": "hc-refit", "other": "other refits"}
MARKERS = "osD^"


def draw(stores: Sequence[Store], file: Path) -> None:
    """Draws one panel per model: excess perplexity against CPU seconds of the conversion, both logarithmic.

    Args:
        stores: What was measured.
        file: Image to write; its suffix decides the format.
    """
    models = [(store, model) for store in stores for model in dict.fromkeys(model for model, _, _ in cases(store))]
    columns = min(2, len(models))
    lines = -(-len(models) // columns)
    with pyplot.rc_context({"font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "hcsmoe"}):
        figure, axes = pyplot.subplots(lines, columns, figsize=(4.6 * columns, 3.6 * lines), squeeze=False)
        for place, (store, model) in zip(axes.flat, models, strict=False):
            _panel(place, store, model)
        for place in axes.flat[len(models) :]:
            place.axis("off")
        handles = [pyplot.Line2D([], [], color=COLOURS[group], marker="o", ls="") for group in COLOURS]
        figure.legend(handles, [NAMES[group] for group in COLOURS], loc="lower center", ncols=3, frameon=False)
        figure.tight_layout(rect=(0, 0.04, 1, 1))
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=120)
        pyplot.close(figure)


def _panel(place: Axes, store: Store, model: str) -> None:
    """One model; a marker for each number of experts."""
    calibration, before = calibrations(store, model)[0], source_key(store, model).experts
    kept = sorted({experts for name, experts, _ in cases(store) if name == model}, reverse=True)
    for marker, experts in zip(MARKERS, kept, strict=False):
        rows = [row for row in measured(store, model, experts, calibration) if row.overall.ratio > 1]
        for row in rows:
            place.plot(*_point(row), marker, color=COLOURS[RECIPES[row.recipe].group], ms=4)
        best = frontier(rows)
        place.plot(*zip(*map(_point, best), strict=True), "-", color="0.3", lw=0.8)
        for row in best:
            place.annotate(
                f"{row.recipe} ({row.keys[0].experts})",
                _point(row),
                fontsize=6,
                xytext=(3, 3),
                textcoords="offset points",
            )
    place.set(xscale="log", yscale="log", title=f"{model}, {before} experts to {' and '.join(map(str, kept))}")
    place.set(xlabel="CPU seconds of the conversion", ylabel="perplexity over the source's, minus 1")
    for axis in (place.xaxis, place.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(NullFormatter())
    place.grid(visible=True, which="major", lw=0.3)


def _point(row: Measured) -> tuple[float, float]:
    return row.mean("cpu_seconds") or 0.0, row.overall.ratio - 1


def frontier(rows: Sequence[Measured]) -> list[Measured]:
    """The recipes than which no other is both cheaper and better, cheapest first."""
    best: list[Measured] = []
    for row in sorted(rows, key=_point):
        if not best or row.overall.ratio < best[-1].overall.ratio:
            best.append(row)
    return best
