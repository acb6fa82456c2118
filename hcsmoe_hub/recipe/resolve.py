"""From the options to the recipe: defaults that suit each other, and a refusal of every option that would be ignored.

Every choice is decided by one small function of the choices before it. It returns the default, or ``NotApplicable``
with the reason why there is nothing to choose.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.options import (
    Align,
    AlignTo,
    Budget,
    Clustering,
    Distance,
    Dominant,
    Features,
    KMeansStart,
    Layout,
    Linkage,
    Merge,
    Method,
    MethodOptions,
    Propagate,
    Refit,
    RouterPolicy,
    Saliency,
    Similarity,
)
from hcsmoe_hub.recipe.presets import complete, given
from hcsmoe_hub.recipe.recipe import NEURON_MERGES, OVERLAPS, Recipe

Chosen = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class NotApplicable:
    """A choice that the others leave nothing to do for."""

    reason: str


def resolve(options: MethodOptions, *, start: MethodOptions | None = None) -> Recipe:
    """Fills in every choice: from the preset, then from the other choices.

    A choice of the preset that the given ones leave nothing to do for is dropped.

    Args:
        options: The choices that are given.
        start: Choices that take the place of a preset.

    Raises:
        PlanError: If a given choice contradicts another one, or would have no effect.
    """
    completed = complete(options) if start is None else replace(start, **given(options))
    chosen: dict[str, Any] = {field.name: getattr(completed, field.name) for field in fields(Recipe)}
    for name, decide in _DECISIONS.items():
        default, asked = decide(chosen), chosen[name]
        if not isinstance(default, NotApplicable):
            chosen[name] = default if asked is None else asked
        elif getattr(options, name) is None:
            # What the preset alone asks for gives way to what is given.
            chosen[name] = None
        else:
            raise PlanError(
                f"`{name}={_text(asked)!r}` would have no effect: {default.reason}.", hint=f"leave `{name}` out"
            )
    for is_wrong, message, hint in _CONTRADICTIONS:
        if is_wrong(chosen):
            words = {key: _text(value) for key, value in chosen.items()}
            raise PlanError(message.format(**words), hint=hint.format(**words))
    return Recipe(**chosen)


def _text(value: Any) -> Any:
    """A value as messages show it: words joined with ``+``."""
    is_list = isinstance(value, tuple) and value and isinstance(value[0], str)
    return "+".join(value) if is_list else str(value) if isinstance(value, str) else value


def _clustering(chosen: Chosen) -> Clustering | NotApplicable:
    return NotApplicable("pruning groups nothing") if chosen["method"] is Method.PRUNE else Clustering.HIERARCHICAL


def _similarity(chosen: Chosen) -> tuple[Similarity, ...] | NotApplicable:
    match chosen["clustering"]:
        case None:
            return NotApplicable("pruning compares no experts with each other")
        case Clustering.RANDOM:
            return NotApplicable("random groups compare nothing")
        case Clustering.HIERARCHICAL if chosen["linkage"] is Linkage.LOSS:
            return NotApplicable("the loss linkage compares single neurons on the calibration text")
    return (Similarity.EXPERT_OUTPUT,)


def _distance(chosen: Chosen) -> Distance | NotApplicable:
    if chosen["linkage"] is Linkage.LOSS and chosen["clustering"] is Clustering.HIERARCHICAL:
        return NotApplicable("the loss linkage measures what a merge would lose instead of a distance")
    if chosen["similarity"] is None:
        return NotApplicable("no experts are compared with each other")
    return Distance.COSINE if chosen["clustering"] is Clustering.SINGLE_SHOT else Distance.EUCLIDEAN


def _linkage(chosen: Chosen) -> Linkage | NotApplicable:
    if chosen["clustering"] is Clustering.HIERARCHICAL:
        return Linkage.AVERAGE
    return NotApplicable("only hierarchical clustering has a linkage")


def _kmeans_start(chosen: Chosen) -> KMeansStart | NotApplicable:
    return (
        KMeansStart.PLUS_PLUS
        if chosen["clustering"] is Clustering.KMEANS
        else NotApplicable("only k-means has a start")
    )


def _max_cluster_size(chosen: Chosen) -> NotApplicable | None:
    match chosen["clustering"]:
        case None:
            return NotApplicable("pruning makes no clusters")
        case Clustering.FUZZY:
            return NotApplicable("every expert belongs to every fuzzy cluster")
        case Clustering.RANDOM:
            return NotApplicable("random groups have no distances to move experts by")
    return None


def _merge(chosen: Chosen) -> Merge | NotApplicable:
    if chosen["method"] is Method.PRUNE:
        return NotApplicable("pruning merges nothing")
    return Merge.MEMBERSHIP if chosen["clustering"] is Clustering.FUZZY else Merge.FREQUENCY


def _dominant_weights(chosen: Chosen) -> NotApplicable | None:
    return (
        None
        if chosen["merge"] is Merge.DOMINANT
        else NotApplicable("only `merge='dominant'` weighs the dominant expert separately")
    )


def _features(chosen: Chosen) -> Features | NotApplicable:
    if chosen["merge"] in NEURON_MERGES:
        return Features.ACTIVATION
    return NotApplicable("only fix-dom and ZipIt match neurons by their features")


def _align(chosen: Chosen) -> Align | NotApplicable:
    if chosen["method"] is Method.PRUNE:
        return NotApplicable("pruned experts stay as they are")
    if chosen["merge"] in NEURON_MERGES:
        return NotApplicable(f"{chosen['merge']} arranges the neurons itself")
    if chosen["merge"] is Merge.NEURONS:
        return NotApplicable("the best neurons of a cluster are kept as they are, in whatever order")
    if chosen["merge"] is Merge.MEMBERSHIP:
        return NotApplicable("the membership merge sums all experts as they are")
    return Align.NONE


def _align_to(chosen: Chosen) -> AlignTo | NotApplicable:
    if isinstance(impossible := _align(chosen), NotApplicable):
        return impossible
    if chosen["align"] is Align.NONE:
        return NotApplicable("`align='none'` leaves neurons in their order")
    return AlignTo.DOMINANT


def _saliency(chosen: Chosen) -> Saliency | NotApplicable:
    return (
        Saliency.REAP
        if chosen["method"] is Method.PRUNE
        else NotApplicable("only `method='prune'` ranks experts to keep")
    )


def _dominant(chosen: Chosen) -> Dominant | NotApplicable:
    if chosen["method"] is Method.PRUNE:
        return NotApplicable("pruning makes no clusters")
    has_followers = (
        chosen["clustering"] is Clustering.SINGLE_SHOT
        or chosen["merge"] in (Merge.FIX_DOM, Merge.FIX_DOM_ONE_TO_ONE, Merge.DOMINANT)
        or chosen["align_to"] is AlignTo.DOMINANT
        or chosen["router"] is RouterPolicy.DOMINANT
        # A fit begins with the rows of the dominant experts, unless there are memberships.
        or (chosen["router"] is RouterPolicy.FIT and not _is_fuzzy(chosen))
    )
    if not has_followers:
        return NotApplicable("here no seed, no neuron, no weight and no router row follows a dominant expert")
    needs_center = chosen["merge"] in (Merge.FIX_DOM, Merge.FIX_DOM_ONE_TO_ONE, Merge.DOMINANT)
    has_center = chosen["clustering"] not in (Clustering.SINGLE_SHOT, Clustering.RANDOM)
    return Dominant.CENTER if needs_center and has_center else Dominant.FREQUENCY


def _is_tied(chosen: Chosen) -> bool:
    """Whether the layout keeps all router rows."""
    return chosen["layout"] in (Layout.MAPPED, Layout.FULL)


def _refit(chosen: Chosen) -> Refit | NotApplicable:
    if _is_tied(chosen):
        return NotApplicable(f"the {chosen['layout']} layout keeps to the papers, which refit nothing")
    return Refit.NONE


def _refit_passes(chosen: Chosen) -> int | NotApplicable:
    if chosen["refit"] in (Refit.BLOCK, Refit.MODEL):
        return 1
    return NotApplicable("only `refit='block'` and `refit='model'` go through text in passes")


def _router(chosen: Chosen) -> RouterPolicy | NotApplicable:
    if _is_tied(chosen):
        return NotApplicable(f"the {chosen['layout']} layout keeps all router rows")
    if chosen["method"] is Method.PRUNE:
        is_fitted = chosen["router"] is RouterPolicy.FIT
        return RouterPolicy.FIT if is_fitted else NotApplicable("experts that are kept keep their router rows")
    return RouterPolicy.MEMBERSHIP if chosen["clustering"] is Clustering.FUZZY else RouterPolicy.DOMINANT


def _propagate(chosen: Chosen) -> Propagate | NotApplicable:
    if chosen["refit"] in (None, Refit.NONE) and chosen["router"] is not RouterPolicy.FIT:
        return NotApplicable("without `refit` and without `router='fit'` no layer is fitted to its inputs")
    return Propagate.ORIGINAL


# In order: each may look at what the ones before it decided.
_DECISIONS: Mapping[str, Callable[[Chosen], Any]] = {
    "layout": lambda chosen: Layout.REDUCED,
    "budget": lambda chosen: Budget.UNIFORM,
    "clustering": _clustering,
    "linkage": _linkage,
    "similarity": _similarity,
    "distance": _distance,
    "kmeans_start": _kmeans_start,
    "max_cluster_size": _max_cluster_size,
    "merge": _merge,
    "dominant_weights": _dominant_weights,
    "features": _features,
    "align": _align,
    "align_to": _align_to,
    "saliency": _saliency,
    "refit": _refit,
    "refit_passes": _refit_passes,
    "router": _router,
    "propagate": _propagate,
    "dominant": _dominant,
}


def _are_weights(numbers: tuple[float, float]) -> bool:
    return min(numbers) >= 0 and max(numbers) > 0


def _is_fuzzy(chosen: Chosen) -> bool:
    return chosen["clustering"] is Clustering.FUZZY


_CONTRADICTIONS: tuple[tuple[Callable[[Chosen], bool], str, str], ...] = (
    (
        lambda c: c["layout"] is Layout.FACTORED and c["compress"] is None,
        "`layout='factored'` holds experts as factors and a few whole rows, but not of which rank and how many.",
        "add a rank and a sparsity, such as `compress='32,0.9'`, or leave `layout` out",
    ),
    (
        lambda c: c["compress"] is not None and c["layout"] is not Layout.FACTORED,
        "`compress='{compress}'` makes factors of every expert matrix, but the {layout} layout holds whole matrices.",
        "leave `layout` or `compress` out",
    ),
    (
        lambda c: c["compress"] is not None and c["refit"] is Refit.MODEL,
        "`refit='model'` trains the weights of a result as a whole, but those of `compress='{compress}'` are factors.",
        "use `refit='block'`, `refit='down'` or `refit='none'`: they fit the experts that the factors are made of",
    ),
    (
        lambda c: (
            c["linkage"] is Linkage.WARD and (c["distance"] is not Distance.EUCLIDEAN or len(c["similarity"]) > 1)
        ),
        "ward linkage measures squared errors, which {distance} distances of {similarity} do not have.",
        "use `distance='euclidean'` with a single `similarity`, or another `linkage`",
    ),
    (
        lambda c: c["similarity"] is not None and len(set(c["similarity"])) < len(c["similarity"]),
        "`similarity='{similarity}'` names a similarity twice.",
        "name each one once in `similarity`",
    ),
    (
        lambda c: (
            c["distance"] in OVERLAPS
            and (c["clustering"] is not Clustering.SINGLE_SHOT or c["similarity"] != (Similarity.EXPERT_OUTPUT,))
        ),
        "`distance='{distance}'` compares the outputs of two experts token by token, which is defined for single-shot "
        "grouping by expert-output only, not for {clustering} by {similarity}.",
        "use `clustering='single-shot'` with `similarity='expert-output'`, or another `distance`",
    ),
    (
        lambda c: c["merge"] is Merge.DOMINANT and c["dominant_weights"] is None,
        "`merge='dominant'` does not say how much the dominant expert weighs.",
        "add two numbers, such as `dominant_weights=(2, 1)`",
    ),
    (
        lambda c: c["dominant_weights"] is not None and not _are_weights(c["dominant_weights"]),
        "`dominant_weights={dominant_weights}` is not a pair of weights: neither may be negative, and one must be "
        "positive.",
        "use two numbers, such as `dominant_weights=(2, 1)`",
    ),
    (
        lambda c: c["method"] is Method.MERGE and _is_fuzzy(c) != (c["merge"] is Merge.MEMBERSHIP),
        "{clustering} clustering and `merge='{merge}'` do not go together: fuzzy clusters, and only they, have "
        "memberships.",
        "use `clustering='fuzzy'` with `merge='membership'`, or neither",
    ),
    (
        lambda c: (
            c["router"] not in (None, RouterPolicy.FIT) and _is_fuzzy(c) != (c["router"] is RouterPolicy.MEMBERSHIP)
        ),
        "{clustering} clustering and `router='{router}'` do not go together: fuzzy clusters, and only they, have "
        "memberships.",
        "use `clustering='fuzzy'` with `router='membership'` or `router='fit'`, or another `clustering`",
    ),
    (
        lambda c: _is_fuzzy(c) and _is_tied(c),
        "the {layout} layout sends every router row to one expert, but a fuzzy cluster has a part of every expert.",
        "use `layout='reduced'`, or another `clustering`",
    ),
    (
        lambda c: c["dominant"] is Dominant.CENTER and c["clustering"] in (Clustering.SINGLE_SHOT, Clustering.RANDOM),
        "{clustering} grouping has no centres to find the dominant expert by.",
        "use `dominant='frequency'`, routing-score or saliency",
    ),
    (
        lambda c: c["method"] is Method.PRUNE and _is_tied(c),
        "the {layout} layout keeps the router rows of all experts, so the router would select experts that no longer "
        "exist.",
        "use `layout='reduced'`",
    ),
    (
        lambda c: c["method"] is Method.PRUNE and bool(c["protect"]) and c["saliency"] is Saliency.RECONSTRUCTION,
        "the reconstruction error chooses whole subsets of experts, so none can be kept beforehand.",
        "use another `saliency`, or leave `protect` out",
    ),
    (
        lambda c: c["budget"] is not Budget.UNIFORM and c["method"] is Method.PRUNE,
        "a {budget} budget gives layers different numbers of experts, and pruning needs a router of the same size in "
        "every layer.",
        "use `budget='uniform'`",
    ),
)
