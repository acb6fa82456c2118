"""Named starting points: every choice that is not given is taken from one of them."""

from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

from hcsmoe_hub.options import (
    Align,
    AlignTo,
    Budget,
    Clustering,
    Dominant,
    Layout,
    Linkage,
    Merge,
    Method,
    MethodOptions,
    Preset,
    Propagate,
    Refit,
    RouterPolicy,
    Saliency,
    Similarity,
)

PRESETS: Mapping[Preset, MethodOptions] = MappingProxyType(
    {
        # Clusters by what a merge would lose, experts of the best neurons of each cluster, fitted layer by layer.
        Preset.HC_REFIT: MethodOptions(
            preset=Preset.HC_REFIT,
            method=Method.MERGE,
            clustering=Clustering.HIERARCHICAL,
            linkage=Linkage.LOSS,
            dominant=Dominant.SALIENCY,
            merge=Merge.NEURONS,
            router=RouterPolicy.FIT,
            refit=Refit.BLOCK,
            propagate=Propagate.MERGED,
        ),
        # Hierarchical clustering of mean expert outputs, average linkage, frequency-weighted (arXiv 2410.08589).
        Preset.HC_SMOE: MethodOptions(preset=Preset.HC_SMOE, method=Method.MERGE),
        # Routing-guided groups around dominant experts, aligned to the first expert of the layer, with its own budget
        # (arXiv 2310.01334).
        Preset.M_SMOE: MethodOptions(
            preset=Preset.M_SMOE,
            method=Method.MERGE,
            clustering=Clustering.SINGLE_SHOT,
            similarity=(Similarity.ROUTER_LOGITS,),
            budget=Budget.M_SMOE,
            align=Align.WEIGHT,
            align_to=AlignTo.FIRST,
            layout=Layout.MAPPED,
        ),
        # Router-weighted expert activation pruning (arXiv 2510.13999).
        Preset.REAP: MethodOptions(preset=Preset.REAP, method=Method.PRUNE, saliency=Saliency.REAP),
    }
)
DEFAULT_PRESET = Preset.HC_REFIT
# Options of grouping and merging that no part of the default can be combined with, whatever their value.
_PUBLISHED = frozenset({"similarity", "distance", "kmeans_start", "dominant_weights", "features", "align", "align_to"})
# Values of the other options that go with the default; others are choices of the published method.
_OWN: Mapping[str, Collection[Any]] = MappingProxyType(
    {
        "clustering": (Clustering.HIERARCHICAL,),
        "linkage": (Linkage.LOSS,),
        "merge": (Merge.NEURONS,),
        "router": (RouterPolicy.FIT,),
        "budget": (Budget.UNIFORM,),
        "layout": (Layout.REDUCED, Layout.FACTORED),
    }
)


def complete(options: MethodOptions) -> MethodOptions:
    """Takes every choice that is not given from a preset: the one that is named, or ``starting_point``.

    Compressed experts have a layout of their own, which holds the same number of them in every layer, whatever the
    preset says.
    """
    own = {"layout": Layout.FACTORED, "budget": Budget.UNIFORM} if options.compress is not None else {}
    return replace(PRESETS[options.preset or starting_point(options)], **{**own, **given(options)})


def starting_point(options: MethodOptions) -> Preset:
    """The preset that suits the choices given, where none is named.

    ``hc-refit``, unless a choice asks for pruning (``method="prune"`` or a saliency), which begins with ``reap``, or
    for something that ``hc-refit`` does otherwise (a similarity, another clustering, linkage, merge or router, a budget
    or another layout), which begins with the published method, ``hc-smoe``.
    """
    values = given(options)
    if options.method is Method.PRUNE or (options.method is None and options.saliency is not None):
        return Preset.REAP
    is_published = any(name in _PUBLISHED or value not in _OWN.get(name, (value,)) for name, value in values.items())
    return Preset.HC_SMOE if is_published else DEFAULT_PRESET


def given(options: MethodOptions) -> dict[str, Any]:
    """The choices that are given, by name."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: value for name, value in values.items() if value is not None}
