"""Named starting points: every choice that is not given is taken from one of them."""

from collections.abc import Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

from hcsmoe_hub.options import (
    Align,
    Budget,
    Clustering,
    Layout,
    Method,
    MethodOptions,
    Preset,
    Refit,
    RouterPolicy,
    Saliency,
    Similarity,
)

PRESETS: Mapping[Preset, MethodOptions] = MappingProxyType(
    {
        # Keeps some experts and fits them to the work of all: what benchmarks/quality.py found best.
        Preset.REFIT: MethodOptions(
            preset=Preset.REFIT, method=Method.PRUNE, saliency=Saliency.REAP, refit=Refit.EXPERTS
        ),
        # Hierarchical clustering of mean expert outputs, average linkage, frequency-weighted (arXiv 2410.08589).
        Preset.HC_SMOE: MethodOptions(preset=Preset.HC_SMOE, method=Method.MERGE),
        # Routing-guided groups around dominant experts, aligned, with its own budget (arXiv 2310.01334).
        Preset.M_SMOE: MethodOptions(
            preset=Preset.M_SMOE,
            method=Method.MERGE,
            clustering=Clustering.SINGLE_SHOT,
            similarity=(Similarity.ROUTER_LOGITS,),
            budget=Budget.M_SMOE,
            align=Align.WEIGHT,
            layout=Layout.MAPPED,
        ),
        # Router-weighted expert activation pruning (arXiv 2510.13999).
        Preset.REAP: MethodOptions(preset=Preset.REAP, method=Method.PRUNE, saliency=Saliency.REAP),
    }
)
DEFAULT_PRESET = Preset.REFIT
# Options that kept experts have as well as merged ones, whatever their value.
_COMMON = frozenset({"preset", "saliency", "refit", "propagate", "protect", "layers", "seed"})


def complete(options: MethodOptions) -> MethodOptions:
    """Takes every choice that is not given from a preset: the one that is named, or ``starting_point``."""
    return replace(PRESETS[options.preset or starting_point(options)], **_given(options))


def starting_point(options: MethodOptions) -> Preset:
    """The preset that suits the choices given, where none is named.

    ``refit``, unless a choice says how experts are grouped or merged, or asks for a router, a budget or a layout that
    only merged experts have: those are choices of the published method, ``hc-smoe``.
    """
    asks_for_merge = any(_asks_for_merge(name, value) for name, value in _given(options).items())
    return Preset.HC_SMOE if asks_for_merge else DEFAULT_PRESET


def _given(options: MethodOptions) -> dict[str, Any]:
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: value for name, value in values.items() if value is not None}


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
