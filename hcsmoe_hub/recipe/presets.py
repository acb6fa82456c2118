"""Named starting points: every method option that is not given is taken from one of them."""

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from hcsmoe_hub.options import (
    Align,
    Budget,
    Clustering,
    Layout,
    Method,
    MethodOptions,
    Refit,
    RouterPolicy,
    Saliency,
    Similarity,
)


class Preset(StrEnum):
    """A method under the name that people know it by."""

    REFIT = "refit"
    HC_SMOE = "hc-smoe"
    M_SMOE = "m-smoe"
    REAP = "reap"


PRESETS: Mapping[Preset, MethodOptions] = MappingProxyType(
    {
        # Keeps some experts and fits them to the work of all: what benchmarks/quality.py found best.
        Preset.REFIT: MethodOptions(method=Method.PRUNE, saliency=Saliency.REAP, refit=Refit.EXPERTS),
        # Hierarchical clustering of mean expert outputs, average linkage, frequency-weighted (arXiv 2410.08589).
        Preset.HC_SMOE: MethodOptions(),
        # Routing-guided groups around dominant experts, aligned, with its own budget (arXiv 2310.01334).
        Preset.M_SMOE: MethodOptions(
            clustering=Clustering.SINGLE_SHOT,
            similarity=(Similarity.ROUTER_LOGITS,),
            budget=Budget.M_SMOE,
            align=Align.WEIGHT,
            layout=Layout.MAPPED,
        ),
        # Router-weighted expert activation pruning (arXiv 2510.13999).
        Preset.REAP: MethodOptions(method=Method.PRUNE, saliency=Saliency.REAP),
    }
)
DEFAULT_PRESET = Preset.REFIT
# Options that kept experts have as well as merged ones, whatever their value.
_COMMON = frozenset({"saliency", "refit", "propagate", "protect", "layers", "seed"})


def starting_point(given: Mapping[str, Any]) -> Preset:
    """The preset that suits the options given, where none is named.

    ``refit``, unless an option says how experts are grouped or merged, or asks for a router, a budget or a layout that
    only merged experts have: those are options of the published method, ``hc-smoe``.
    """
    return Preset.HC_SMOE if any(_asks_for_merge(name, value) for name, value in given.items()) else DEFAULT_PRESET


def _asks_for_merge(name: str, value: Any) -> bool:
    match name:
        case "method":
            return value is Method.MERGE
        case "layout":
            return value is not Layout.REDUCED
        case "budget":
            return value is not Budget.UNIFORM
        case "router":
            return value is not RouterPolicy.FIT
        case _:
            return name not in _COMMON


def method_options(preset: Preset | None = None, **given: Any) -> MethodOptions:
    """Options of a preset, changed where others are given.

    Args:
        preset: Where to start; ``None`` takes ``starting_point``.
        given: Fields of ``MethodOptions``; ``None`` counts as not given.
    """
    given = {name: value for name, value in given.items() if value is not None}
    return replace(PRESETS[preset or starting_point(given)], **given)
