"""Draws size against quality: bytes of the weights against the ratio of perplexities, a line per width of the experts.

matplotlib is an optional dependency, so only the functions that draw import it.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.machine.versions import has_matplotlib
from hcsmoe_hub.report.curve import CurvePoint, CurveReport
from hcsmoe_hub.result.figure import DPI, FAINT, INK, PALETTE, STYLE, WIDTH, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 4.6
# Bytes of the unit of the axis, from which size of a source on.
_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def draw_curve(report: CurveReport, path: Path, *, title: str) -> None:
    """Draws a curve.

    There is a solid line for every width with the number of experts at its points, and a dashed one for every number of
    experts where there are several widths. A filled mark is a measured ratio, a hollow one a predicted ratio.

    Args:
        report: What was found.
        path: The PNG file to write, 1600 pixels wide.
        title: Heading of the figure, as plain text.

    Raises:
        PlanError: If matplotlib is not installed.
    """
    if not has_matplotlib():
        raise PlanError("a figure needs matplotlib, which is not installed.", hint="pip install 'hcsmoe[plots]'")
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
        figure.suptitle(title, fontsize=11, weight="bold", x=0.01, ha="left")
        axes = figure.add_subplot()
        _draw_lines(axes, report)
        save(figure, path)


def _draw_lines(axes: "Axes", report: CurveReport) -> None:
    unit, name = next((unit for unit in _UNITS if report.weights_bytes >= unit[0]), _UNITS[-1])
    points = [point for point in report.points if point.ratio is not None]
    for experts, line in _lines(points, "experts"):
        if len(line) > 1:
            _plot(axes, line, unit, color=FAINT, linewidth=0.7, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(
                f"{experts} experts",
                (line[0].weights_bytes / unit, line[0].ratio or 1.0),
                textcoords="offset points",
                xytext=(-4, 5),
                ha="right",
                fontsize=7,
                color=FAINT,
            )
    for number, (width, line) in enumerate(_lines(points, "expert_width")):
        colour = PALETTE[number % len(PALETTE)]
        label = f"{width} neurons ({width / report.expert_width:.0%})"
        _plot(axes, line, unit, color=colour, linewidth=1.4, label=label, zorder=2)
        for point in line:
            inside = colour if point.measured is not None else "white"
            place = (point.weights_bytes / unit, point.ratio or 1.0)
            axes.plot(*place, "o", color=colour, markerfacecolor=inside, markersize=5, zorder=3)
    axes.axhline(1, color=INK, linewidth=0.6)
    # Room for the names of the points at both ends.
    axes.margins(x=0.12)
    axes.set_xlabel(f"weights, {name}")
    axes.set_ylabel("perplexity over that of the source")
    axes.legend(frameon=False, title="width of the experts", title_fontsize=8)


def _lines(points: Sequence[CurvePoint], field: str) -> list[tuple[int, list[CurvePoint]]]:
    """The points that agree in a field, smallest first; the largest value of the field first."""

    def value(point: CurvePoint) -> int:
        found: int = getattr(point, field)
        return found

    ordered = sorted(points, key=lambda point: (-value(point), point.weights_bytes))
    return [(number, list(line)) for number, line in groupby(ordered, value)]


def _plot(axes: "Axes", line: Sequence[CurvePoint], unit: int, **how: Any) -> None:
    axes.plot([point.weights_bytes / unit for point in line], [point.ratio or 1.0 for point in line], **how)
