"""Draws a figure of a conversion: tokens routed, distances between experts, and clusters.

matplotlib is an optional dependency, so only the functions that draw import it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from scipy.cluster import hierarchy

from hcsmoe_hub.checkpoint.durable import write_file
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.layer.picture import LayerPicture
from hcsmoe_hub.machine.versions import has_matplotlib
from hcsmoe_hub.methods.clustering.clusters import DROPPED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# Paul Tol's "muted" scheme: distinguishable with any colour vision, and dark enough on white.
PALETTE = ("#332288", "#CC6677", "#117733", "#DDCC77", "#882255", "#88CCEE", "#999933", "#AA4499", "#44AA99")
PRUNED, ACROSS, INK, FAINT = "#C8C8C8", "#8A8A8A", "#222222", "#666666"
MAX_LAYERS, MAX_ROWS, MAX_NAMED_EXPERTS = 12, 6, 16
# Inches. At 200 dots per inch the picture is twice the 800 pixels of a model card.
WIDTH, DPI, MARGIN, LINE, STRIP = 8.0, 200, 0.12, 0.19, 0.05
# Points: gaps between thinner bars would not be visible.
MIN_GAPPED_CELL = 1.2
# Near and far. Few levels, because a noisy matrix with many levels takes megabytes.
SHADES, LEVELS = ("#FFFFFF", "#4A4A4A"), 16
_MIXED = -2
_TICKS = {"labelsize": 7, "color": FAINT, "labelcolor": INK, "major.width": 0.6, "major.size": 2, "major.pad": 2}
STYLE: dict[str, Any] = {f"{axis}tick.{key}": value for axis in "xy" for key, value in _TICKS.items()} | {
    "font.size": 8,
    "axes.linewidth": 0.6,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}


def shown_layers(layers: Sequence[LayerPicture]) -> list[LayerPicture]:
    """At most ``MAX_LAYERS`` layers, evenly spaced, including the first and the last."""
    places = np.linspace(0, len(layers) - 1, min(len(layers), MAX_LAYERS)).round().astype(int)
    return [layers[place] for place in places]


def expert_order(picture: LayerPicture) -> list[int]:
    """Source experts from left to right.

    Args:
        picture: A layer of E experts.

    Returns:
        The E experts in the order of the dendrogram's leaves; without a dendrogram, by cluster, pruned experts last;
        if nothing was merged, by decreasing usage. Ties go to the lower number.
    """
    if picture.dendrogram is not None:
        return [int(leaf) for leaf in hierarchy.leaves_list(picture.dendrogram)]
    experts = range(len(picture.labels))
    if not picture.is_merged:
        return sorted(experts, key=lambda expert: -picture.usage[expert])
    return sorted(experts, key=lambda expert: (picture.labels[expert] == DROPPED, picture.labels[expert]))


def cluster_colours(picture: LayerPicture) -> dict[int, str]:
    """The colour of every cluster, and of ``DROPPED``.

    Colours follow the order of :func:`expert_order`. If there are more clusters than colours, they repeat, but never
    side by side. If nothing was merged, all kept experts have the same colour.
    """
    drawn = dict.fromkeys(int(picture.labels[expert]) for expert in expert_order(picture))
    drawn.pop(DROPPED, None)
    colours = {label: PALETTE[place % len(PALETTE) if picture.is_merged else 0] for place, label in enumerate(drawn)}
    return colours | {DROPPED: PRUNED}


def _node_labels(tree: NDArray[Any], labels: Sequence[int]) -> list[int]:
    """Cluster of every leaf and merge of a tree, ``_MIXED`` for a merge of several clusters."""
    nodes = [int(label) for label in labels]
    for left, right in tree[:, :2].astype(int):
        nodes.append(nodes[left] if nodes[left] == nodes[right] else _MIXED)
    return nodes


def cut_height(tree: NDArray[Any], labels: Sequence[int]) -> float | None:
    """The height at which a horizontal cut through a tree gives the clusters.

    Args:
        tree: Linkage matrix ``[E - 1, 4]``.
        labels: Cluster of each of the E experts.

    Returns:
        The midpoint between the last merge within a cluster and the first across clusters; ``None`` if no cut gives
        these clusters, as with a size limit, or if there is only one cluster.
    """
    is_mixed = np.array(_node_labels(tree, labels)[len(labels) :], dtype=int) == _MIXED
    within, across = tree[~is_mixed, 2], tree[is_mixed, 2]
    if not len(across) or len(across) + 1 != len(set(labels)):
        return None
    low, high = float(within.max(initial=0.0)), float(across.min())
    return (low + high) / 2 if low <= high else None


def _cell(axes: "Axes", picture: LayerPicture) -> float:
    """Width of one expert in points, 1/72 inch."""
    return axes.bbox.width / DPI * 72 / len(picture.labels)


def _label_experts(axis: "Axis", order: Sequence[int], *, is_named: bool) -> None:
    """Labels the experts along an axis, if there is room."""
    ticks = range(len(order)) if is_named else ()
    axis.set_ticks(ticks, labels=[str(order[tick]) for tick in ticks])
    axis.set_tick_params(length=0, labelsize=7 if len(order) <= 10 else 6)


def _label_heights(axes: "Axes", picture: LayerPicture) -> None:
    """Labels a vertical axis of distances with full numbers: a common factor above it would overlap the heading."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0) if picture.is_loss else StrMethodFormatter("{x:.4g}"))


def _draw_usage(axes: "Axes", picture: LayerPicture, *, is_named: bool) -> None:
    """Bars of the tokens that every expert received, in the colours of the clusters."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    order, colours = expert_order(picture), cluster_colours(picture)
    has_gaps = _cell(axes, picture) > MIN_GAPPED_CELL
    heights = [picture.usage[expert] for expert in order]
    bars = [colours[int(picture.labels[expert])] for expert in order]
    # Snapped to whole pixels, bars thinner than one would disappear at random.
    axes.bar(range(len(order)), heights, width=0.8 if has_gaps else 1.0, color=bars, linewidth=0, snap=has_gaps)
    axes.set_xlim(-0.5, len(order) - 0.5)
    axes.set_ylim(0, max(1, *picture.usage) * 1.04)
    _label_experts(axes.xaxis, order, is_named=is_named)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4 if axes.bbox.height > 0.6 * DPI else 2, integer=True))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_distances(axes: "Axes", picture: LayerPicture, distances_EE: NDArray[Any], *, is_named: bool) -> "AxesImage":
    """The distance matrix, with a frame around every cluster."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    order, colours = expert_order(picture), cluster_colours(picture)
    matrix_EE = np.asarray(distances_EE, dtype=float)[np.ix_(order, order)]
    # The zeros of the diagonal would take up most of the scale.
    others = matrix_EE[~np.eye(len(order), dtype=bool) & np.isfinite(matrix_EE)]
    low, high = (float(others.min()), float(others.max())) if len(others) else (0.0, 1.0)
    shades = LinearSegmentedColormap.from_list("shades", SHADES, N=LEVELS)
    # A cell smaller than a pixel is averaged with its neighbours instead of left out.
    how = "nearest" if _cell(axes, picture) * DPI >= 72 else "auto"
    shown_EE = np.ma.masked_invalid(matrix_EE)
    image = axes.imshow(shown_EE, cmap=shades, vmin=low, vmax=high, interpolation=how, interpolation_stage="data")
    width = float(np.clip(_cell(axes, picture) / 5, 0.6, 1.6))
    start = -0.5
    for label, run in groupby(int(picture.labels[expert]) for expert in order):
        size = len(list(run))
        if label != DROPPED:
            frame = Rectangle((start, start), size, size, fill=False, edgecolor=colours[label], linewidth=width)
            axes.add_patch(frame).set_clip_on(False)
        start += size
    for axis in (axes.xaxis, axes.yaxis):
        _label_experts(axis, order, is_named=is_named)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_linewidth(0.4)
    return image


def _draw_tree(axes: "Axes", picture: LayerPicture, tree: NDArray[Any], *, is_named: bool) -> None:
    """The dendrogram, with the merges inside clusters in their colours and a line at the cut."""
    from matplotlib.collections import LineCollection

    order, nodes = expert_order(picture), _node_labels(tree, picture.labels)
    colours = cluster_colours(picture) | {_MIXED: ACROSS}
    found = hierarchy.dendrogram(tree, no_plot=True, link_color_func=lambda node: colours[nodes[node]])
    # scipy puts leaf i at 10 i + 5.
    links = np.stack([np.array(found["icoord"]) / 10 - 0.5, np.array(found["dcoord"])], axis=2)
    width = float(np.clip(_cell(axes, picture) / 4, 0.3, 1.1))
    axes.add_collection(LineCollection(list(links), colors=found["color_list"], linewidths=width))
    low, high = tree[:, 2].min(), tree[:, 2].max()
    # If all experts are far apart, an axis from zero would show little but their stems.
    bottom = low - 0.25 * (high - low) if high / 3 < low < high else 0.0
    axes.set_xlim(-0.5, len(order) - 0.5)
    axes.set_ylim(bottom, bottom + ((high - bottom) * 1.05 or 1.0))
    _label_heights(axes, picture)
    _label_experts(axes.xaxis, order, is_named=is_named)
    axes.xaxis.set_tick_params(pad=STRIP * 72 + 2)
    axes.spines["bottom"].set_visible(False)
    strip = STRIP / (axes.bbox.height / DPI)
    leaves = [colours[int(picture.labels[expert])] for expert in order]
    where = axes.get_xaxis_transform()
    axes.bar(range(len(order)), -strip, width=1.0, color=leaves, linewidth=0, transform=where, clip_on=False)
    cut = cut_height(tree, picture.labels)
    if cut is not None:
        axes.axhline(cut, color=INK, linewidth=0.8, linestyle=(0, (4, 2)))


@dataclass(frozen=True, slots=True)
class _Page:
    """A figure whose panels are placed in inches from its top left corner."""

    figure: "Figure"
    height: float

    def panel(self, left: float, top: float, width: float, height: float) -> "Axes":
        """Adds axes."""
        bottom = self.height - top - height
        return self.figure.add_axes((left / WIDTH, bottom / self.height, width / WIDTH, height / self.height))

    def write(self, left: float, top: float, words: str, **how: Any) -> None:
        """Adds text."""
        self.figure.text(left / WIDTH, 1 - top / self.height, words, **({"va": "top"} | how))


def _caption(layers: Sequence[LayerPicture], shown: Sequence[LayerPicture]) -> str:
    """The caption: which layers are shown, and the meaning of order, colours, shades and lines."""
    is_merged = any(picture.is_merged for picture in shown)
    has_distances, has_tree = _panels(shown)
    is_loss = any(picture.is_loss for picture in shown)
    cuts = [cut_height(picture.dendrogram, picture.labels) for picture in shown if picture.dendrogram is not None]
    parts = {
        f"{len(shown)} of {len(layers)} layers": len(shown) < len(layers),
        "colours: clusters": is_merged,
        "experts in one order in all panels of a layer": is_merged and has_distances,
        "most used expert first": not is_merged and not has_tree,
        "blue: kept": not is_merged,
        "grey: pruned": any(DROPPED in picture.labels for picture in shown),
        "light: close": has_distances and not is_loss,
        "light: little lost by a merge": has_distances and is_loss,
        "heights: share of the layer's output energy lost": has_tree and is_loss,
        "dashed line: cut": any(cut is not None for cut in cuts),
    }
    text = " · ".join(part for part, is_true in parts.items() if is_true)
    return text[0].upper() + text[1:]


def _panels(shown: Sequence[LayerPicture]) -> tuple[bool, bool]:
    """Whether any layer has distances, and whether any has a dendrogram."""
    has_distances = any(picture.distances_EE is not None for picture in shown)
    return has_distances, any(picture.dendrogram is not None for picture in shown)


def _rows(shown: Sequence[LayerPicture], start: float) -> tuple[float, Callable[[_Page], None]]:
    """Lays out one row per layer, its panels side by side.

    Returns:
        Where the last row ends, and the function that draws the rows. Rows begin at ``start``; both positions are in
        inches from the top.
    """
    has_distances, has_tree = _panels(shown)
    height = 1.75 if has_distances else 1.3 if has_tree else 1.0
    left, top_gap, step = 0.86, 0.22, height + 0.38
    room = WIDTH - MARGIN - left - (height + 0.85 if has_distances else 0.0) - (0.4 if has_tree else 0.0)
    wide = room / (2 if has_tree else 1)
    middle, right = left + wide + 0.3, WIDTH - MARGIN - wide
    headings = {"Tokens routed": left}
    what = "Loss by merging" if any(picture.is_loss for picture in shown) else "Distances"
    headings |= {what: middle} if has_distances else {}
    headings |= {"Dendrogram": right} if has_tree else {}

    def draw_rows(page: _Page) -> None:
        for words, place in headings.items():
            page.write(place, start, words, color=FAINT)
        for number, picture in enumerate(shown):
            top = start + top_gap + number * step
            is_named = len(picture.labels) <= MAX_NAMED_EXPERTS
            upright = {"rotation": 90, "va": "center", "ha": "center"}
            page.write(0.2, top + height / 2, f"Layer {picture.layer}", weight="bold", **upright)
            page.write(0.37, top + height / 2, f"{picture.summary} experts", color=FAINT, fontsize=7, **upright)
            _draw_usage(page.panel(left, top, wide, height), picture, is_named=is_named)
            if picture.distances_EE is not None:
                axes = page.panel(middle, top, height, height)
                image = _draw_distances(axes, picture, picture.distances_EE, is_named=is_named)
                scale = page.panel(middle + height + 0.08, top, 0.07, height)
                page.figure.colorbar(image, cax=scale).outline.set_linewidth(0.4)
                _label_heights(scale, picture)
            if picture.dendrogram is not None:
                _draw_tree(page.panel(right, top, wide, height), picture, picture.dendrogram, is_named=is_named)

    return start + top_gap + len(shown) * step, draw_rows


def _cards(shown: Sequence[LayerPicture], start: float) -> tuple[float, Callable[[_Page], None]]:
    """Lays out a grid of layers, the panels of each stacked on one expert axis; otherwise like :func:`_rows`."""
    has_distances, has_tree = _panels(shown)
    columns = 4 if has_distances or has_tree else 2
    step = (WIDTH - 2 * MARGIN) / columns
    wide, title, gap, usage = step - 0.35, 0.2, 0.09, 0.5
    to_square = title + (0.5 + gap if has_tree else 0.0)
    to_usage = to_square + (wide + gap if has_distances else 0.0)
    height = to_usage + usage + 0.24

    def draw_cards(page: _Page) -> None:
        for number, picture in enumerate(shown):
            row, column = divmod(number, columns)
            left, top = MARGIN + 0.3 + column * step, start + row * height
            page.write(left, top, f"Layer {picture.layer}", weight="bold")
            page.write(left + wide, top, picture.summary, color=FAINT, ha="right")
            if picture.dendrogram is not None:
                axes = page.panel(left, top + title, wide, 0.5)
                _draw_tree(axes, picture, picture.dendrogram, is_named=False)
                axes.set_yticks([])
                axes.spines["left"].set_visible(False)
            if picture.distances_EE is not None:
                axes = page.panel(left, top + to_square, wide, wide)
                _draw_distances(axes, picture, picture.distances_EE, is_named=False)
            _draw_usage(page.panel(left, top + to_usage, wide, usage), picture, is_named=False)

    return start + -(-len(shown) // columns) * height, draw_cards


def draw(layers: Sequence[LayerPicture], path: Path, *, title: str) -> None:
    """Draws a figure of a conversion for a model card.

    Up to ``MAX_ROWS`` layers get a row each: tokens routed, distances, dendrogram. More layers are shown in a grid, and
    of more than ``MAX_LAYERS`` only evenly spaced ones, as the caption then says. A layer without distances or a
    dendrogram lacks that panel. Equal layers give equal bytes, whatever the user's matplotlib settings are.

    Args:
        layers: The MoE layers in the order of the model, at least one.
        path: The PNG file to write, 1600 pixels wide.
        title: Heading of the figure, as plain text.

    Raises:
        PlanError: If matplotlib is not installed.
        ValueError: If there is no layer.
    """
    if not layers:
        raise ValueError("A figure needs at least one layer.")
    if not has_matplotlib():
        raise PlanError("a figure needs matplotlib, which is not installed.", hint="pip install 'hcsmoe[plots]'")
    from matplotlib import style
    from matplotlib.figure import Figure

    shown = shown_layers(layers)
    heading, caption = wrap(title, 78), wrap(_caption(layers, shown), 130)
    start = MARGIN + LINE * (len(heading) + len(caption)) + 0.12
    end, draw_layers = (_rows if len(shown) <= MAX_ROWS else _cards)(shown, start)
    with style.context(["default", STYLE]):
        page = _Page(figure=Figure(figsize=(WIDTH, end), dpi=DPI), height=end)
        for number, line in enumerate(heading):
            page.write(MARGIN, MARGIN + number * LINE, line, fontsize=11, weight="bold")
        for number, line in enumerate(caption, len(heading)):
            page.write(MARGIN, MARGIN + number * LINE + 0.03, line, color=FAINT)
        draw_layers(page)
        save(page.figure, path)


def save(figure: "Figure", path: Path) -> None:
    """Writes a figure as PNG; the same figure always has the same bytes."""

    def fill(file: BinaryIO) -> None:
        # The version in the metadata would change the bytes.
        figure.savefig(file, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})

    write_file(path, fill)
