"""Draws the singular values of expert matrices, before and after experts were merged and aligned.

matplotlib is an optional dependency, so only the functions that draw import it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from hcsmoe_hub.layer.spectra import Spectra
from hcsmoe_hub.methods.compress import stable_rank
from hcsmoe_hub.result.figure import DPI, FAINT, INK, MARGIN, MAX_LAYERS, PALETTE, STYLE, WIDTH, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Inches.
_ROW, _TOP, _BOTTOM = 1.5, 0.75, 0.45
# Of the experts between which the shaded band lies.
_BAND = (0.1, 0.9)
_BEFORE, _AFTER = FAINT, PALETTE[0]


def draw_spectra(spectra: Mapping[int, Spectra], path: Path, *, title: str) -> None:
    """Draws the singular values of each matrix of each layer, as shares of the largest one.

    A line is the mean over the experts of a layer, the band around it holds four of five of them. Of more than
    ``MAX_LAYERS`` layers, evenly spaced ones are shown. Equal values give equal bytes.

    Args:
        spectra: Singular values by decoder layer, at least one.
        path: The PNG file to write, 1600 pixels wide.
        title: Heading of the figure, as plain text.

    Raises:
        ValueError: If there is no layer.
    """
    if not spectra:
        raise ValueError("A figure needs at least one layer.")
    from matplotlib import style
    from matplotlib.figure import Figure

    layers = sorted(spectra)
    places = np.linspace(0, len(layers) - 1, min(len(layers), MAX_LAYERS)).round().astype(int)
    shown = [layers[place] for place in places]
    names = list(spectra[shown[0]].before)
    height = _TOP + _ROW * len(shown) + _BOTTOM
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI)
        grid = figure.subplots(len(shown), len(names), sharex="col", sharey=True, squeeze=False)
        figure.subplots_adjust(
            left=0.08, right=0.98, top=1 - _TOP / height, bottom=_BOTTOM / height, hspace=0.25, wspace=0.1
        )
        for row, layer in enumerate(shown):
            for column, name in enumerate(names):
                _draw_panel(grid[row, column], spectra[layer].before[name], spectra[layer].after[name])
            grid[row, 0].set_ylabel(f"Layer {layer}")
        for column, name in enumerate(names):
            grid[0, column].set_title(name, fontsize=8, loc="left")
            grid[-1, column].set_xlabel("singular value, of the smaller side")
        edge = MARGIN / WIDTH
        figure.text(edge, 1 - MARGIN / height, title, fontsize=11, weight="bold", va="top")
        figure.text(edge, 1 - (MARGIN + 0.24) / height, _caption(len(shown), len(layers)), color=FAINT, va="top")
        save(figure, path)


def _caption(shown: int, layers: int) -> str:
    parts = [f"{shown} of {layers} layers"] if shown < layers else []
    parts += ["singular values as shares of the largest", "grey: experts before merging"]
    parts += ["dark: after merging and alignment", "numbers: mean stable rank"]
    text = " · ".join(parts)
    return text[0].upper() + text[1:]


def _draw_panel(axes: "Axes", before_ER: Tensor, after_KR: Tensor) -> None:
    """The spectra of one matrix of one layer."""
    ranks = []
    for values_ER, colour in ((before_ER, _BEFORE), (after_KR, _AFTER)):
        shares_ER = (values_ER / values_ER[:, :1].clamp(min=np.finfo(float).tiny)).numpy()
        across = np.linspace(0, 1, shares_ER.shape[1])
        axes.fill_between(across, *np.quantile(shares_ER, _BAND, axis=0), color=colour, alpha=0.2, linewidth=0)
        axes.plot(across, shares_ER.mean(axis=0), color=colour, linewidth=1)
        ranks.append(float(np.mean([stable_rank(values_R) for values_R in values_ER])))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    words = " → ".join(f"{rank:.1f}" for rank in ranks)
    axes.text(0.97, 0.93, words, transform=axes.transAxes, ha="right", va="top", color=INK)
