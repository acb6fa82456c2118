"""The recipes that ``quality.py`` compares: published baselines, the default, and what differs from it in one respect.

Choices are the words that the command line takes. Every recipe that is not the default names its preset, since what
``convert`` starts from where none is named depends on the other choices.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hcsmoe_hub import MethodOptions


@dataclass(frozen=True, slots=True)
class Compared:
    """A recipe in the tables.

    Attributes:
        title: Its name there.
        choices: Options of the method, as words.
        text: Calibration tokens, as a multiple of the default number for the recipe.
        group: ``baseline`` for published methods, whose best is the measure of the others; ``fit`` for what is measured
            by it; ``other`` for the rest.
    """

    title: str
    choices: Mapping[str, Any] = field(default_factory=dict)
    text: int = 1
    group: str = "other"

    def options(self, seed: int) -> MethodOptions:
        """The options of the method with a seed."""
        return MethodOptions(**self.choices, seed=seed)


def _pruned(title: str, saliency: str) -> Compared:
    return Compared(title, {"preset": "reap", "saliency": saliency}, group="baseline")


# What the default does after its clustering.
_REST = {"merge": "neurons", "router": "fit", "refit": "block", "propagate": "merged"}
RECIPES: Mapping[str, Compared] = {
    # The papers keep all router rows.
    "hc-smoe-full": Compared("HC-SMoE, full router", {"preset": "hc-smoe", "layout": "full"}, group="baseline"),
    # Aligned to the dominant experts, as its rows were measured; the paper aligns to the first expert of the layer.
    "m-smoe-full": Compared(
        "M-SMoE, full router", {"preset": "m-smoe", "layout": "full", "align_to": "dominant"}, group="baseline"
    ),
    "hc-smoe": Compared("HC-SMoE", {"preset": "hc-smoe"}, group="baseline"),
    "random": Compared("random groups", {"preset": "hc-smoe", "clustering": "random"}, group="baseline"),
    "f-prune": _pruned("F-prune", "frequency"),
    "s-prune": _pruned("S-prune", "routing-score"),
    "reap": _pruned("REAP", "reap"),
    "reconstruction": _pruned("reconstruction", "reconstruction"),
    "gram": _pruned("Gram matrix", "gram"),
    "total-mass": _pruned("total mass", "total-mass"),
    "man": _pruned("MAN", "man"),
    "down": Compared("REAP + down", {"preset": "reap", "refit": "down"}),
    "reap-block": Compared("REAP-kept + block", {"preset": "reap", "refit": "block"}),
    "hc-block": Compared("HC-SMoE's clusters + neurons + block", {"preset": "hc-smoe", **_REST}),
    "random-block": Compared("random groups + neurons + block", {"preset": "hc-smoe", "clustering": "random", **_REST}),
    "no-refit": Compared("hc-refit, refit none", {"preset": "hc-refit", "refit": "none"}),
    "original": Compared("hc-refit, propagate original", {"preset": "hc-refit", "propagate": "original"}, group="fit"),
    "default": Compared("hc-refit (default)", group="fit"),
    "passes-2": Compared("hc-refit, 2 passes, twice the text", {"refit_passes": 2}, text=2, group="fit"),
    "passes-4": Compared("hc-refit, 4 passes, twice the text", {"refit_passes": 4}, text=2, group="fit"),
    "model": Compared("hc-refit, then the whole model", {"preset": "hc-refit", "refit": "model"}, group="fit"),
    "best": Compared(
        "best: 4 passes, twice the text, then the whole model",
        {"preset": "hc-refit", "refit": "model", "refit_passes": 4, "propagate": "merged"},
        text=2,
        group="fit",
    ),
}
# Those that the issue of absent domains is about.
ABSENT = ("default", "reap", "down")
# Whose CPU time on the same tokens all others are compared with.
REFERENCE = "hc-smoe"
