"""Choices that suit each other: defaults, refusals of what would be ignored, and contradictions."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import fields
from enum import StrEnum
from typing import Any

import pytest

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
    Preset,
    Propagate,
    Refit,
    RouterPolicy,
    Saliency,
    Similarity,
)
from hcsmoe_hub.recipe.recipe import Recipe
from hcsmoe_hub.recipe.resolve import resolve

BOTH = (Similarity.EXPERT_OUTPUT, Similarity.WEIGHT)
PRUNE = {"method": Method.PRUNE}
FUZZY = {"clustering": Clustering.FUZZY}
SINGLE_SHOT = {"clustering": Clustering.SINGLE_SHOT}
RANDOM = {"clustering": Clustering.RANDOM}
FIT = {"router": RouterPolicy.FIT}
DOMINANT_MERGE: dict[str, Any] = {"merge": Merge.DOMINANT, "dominant_weights": (2.0, 1.0)}


def published(**asked: Any) -> MethodOptions:
    """Options that start from the published method, whatever they ask for."""
    return MethodOptions(preset=Preset.HC_SMOE, **asked)


def chosen(**asked: Any) -> dict[str, Any]:
    """Every choice in force that is not left open."""
    recipe = resolve(published(**asked))
    return {name: value for name, value in vars_of(recipe).items() if value not in (None, ())}


def vars_of(choices: MethodOptions | Recipe) -> dict[str, Any]:
    """The choices by name."""
    return {field.name: getattr(choices, field.name) for field in fields(choices)}


def refused(**asked: Any) -> PlanError:
    """The refusal of some choices."""
    with pytest.raises(PlanError) as caught:
        resolve(published(**asked))
    return caught.value


# Defaults

COMMON = {"budget": Budget.UNIFORM, "refit": Refit.NONE, "layout": Layout.REDUCED, "seed": 42}
# What there is to choose besides where anything is fitted.
FITTED = {"propagate": Propagate.ORIGINAL}
MERGED = COMMON | {"method": Method.MERGE}
HC_SMOE = MERGED | {
    "similarity": (Similarity.EXPERT_OUTPUT,),
    "distance": Distance.EUCLIDEAN,
    "clustering": Clustering.HIERARCHICAL,
    "linkage": Linkage.AVERAGE,
    "dominant": Dominant.FREQUENCY,
    "merge": Merge.FREQUENCY,
    "align": Align.NONE,
    "router": RouterPolicy.DOMINANT,
}


def without(recipe: dict[str, Any], *names: str, **others: Any) -> dict[str, Any]:
    """A recipe with some choices left out and some others."""
    return {name: value for name, value in recipe.items() if name not in names} | others


def test_nothing_asked_is_the_method_of_hc_smoe() -> None:
    assert chosen() == HC_SMOE


def test_pruning_follows_reap_and_leaves_everything_about_clusters_open() -> None:
    assert chosen(**PRUNE) == COMMON | {"method": Method.PRUNE, "saliency": Saliency.REAP}


def test_the_rows_that_pruning_keeps_can_be_fitted_and_nothing_else() -> None:
    assert chosen(**PRUNE, **FIT) == chosen(**PRUNE) | FIT | FITTED
    messages = {refused(**PRUNE, router=router).message for router in set(RouterPolicy) - {RouterPolicy.FIT}}
    assert all("would have no effect: experts that are kept keep their router rows" in text for text in messages)


def test_a_fit_follows_dominant_experts_where_there_are_no_memberships() -> None:
    assert chosen(**FIT, dominant=Dominant.CENTER) == HC_SMOE | FIT | FITTED | {"dominant": Dominant.CENTER}
    assert chosen(**FUZZY, **FIT) == chosen(**FUZZY) | FIT | FITTED
    assert refused(**FUZZY, **FIT, dominant=Dominant.CENTER).hint == "leave `dominant` out"


def test_kmeans_starts_with_plus_plus() -> None:
    expected = without(HC_SMOE, "linkage", clustering=Clustering.KMEANS, kmeans_start=KMeansStart.PLUS_PLUS)
    assert chosen(clustering=Clustering.KMEANS) == expected


def test_fuzzy_clusters_merge_experts_and_rows_by_membership() -> None:
    expected = without(
        HC_SMOE, "linkage", "align", "dominant", **FUZZY, merge=Merge.MEMBERSHIP, router=RouterPolicy.MEMBERSHIP
    )
    assert chosen(**FUZZY) == expected


def test_single_shot_grouping_compares_by_cosine() -> None:
    assert chosen(**SINGLE_SHOT) == without(HC_SMOE, "linkage", **SINGLE_SHOT, distance=Distance.COSINE)


def test_random_groups_compare_nothing() -> None:
    assert chosen(**RANDOM) == without(HC_SMOE, "linkage", "similarity", "distance", **RANDOM)


@pytest.mark.parametrize("merge", [Merge.FIX_DOM, Merge.FIX_DOM_ONE_TO_ONE])
def test_fix_dom_follows_the_centre_by_activations(merge: Merge) -> None:
    expected = without(HC_SMOE, "align", merge=merge, features=Features.ACTIVATION, dominant=Dominant.CENTER)
    assert chosen(merge=merge) == expected


def test_zipit_matches_by_activations() -> None:
    assert chosen(merge=Merge.ZIPIT) == without(HC_SMOE, "align", merge=Merge.ZIPIT, features=Features.ACTIVATION)


def test_a_merge_that_weighs_the_dominant_expert_finds_it_in_the_centre() -> None:
    assert chosen(**DOMINANT_MERGE) == HC_SMOE | DOMINANT_MERGE | {"dominant": Dominant.CENTER}


@pytest.mark.parametrize("clustering", [Clustering.SINGLE_SHOT, Clustering.RANDOM])
@pytest.mark.parametrize("merge", [{"merge": Merge.FIX_DOM}, DOMINANT_MERGE])
def test_where_there_is_no_centre_the_most_used_expert_is_followed(
    clustering: Clustering, merge: dict[str, Any]
) -> None:
    assert chosen(clustering=clustering, **merge)["dominant"] is Dominant.FREQUENCY


@pytest.mark.parametrize("layout", [Layout.MAPPED, Layout.FULL])
def test_layouts_that_keep_all_router_rows_have_no_router_policy(layout: Layout) -> None:
    assert chosen(layout=layout) == without(HC_SMOE, "router", "refit", "dominant", layout=layout)


@pytest.mark.parametrize(
    ("asked", "needs"),
    [
        ({}, False),
        ({"merge": Merge.ZIPIT}, True),
        ({"merge": Merge.ZIPIT, "features": Features.ACTIVATION_WEIGHT}, True),
        ({"merge": Merge.ZIPIT, "features": Features.WEIGHT}, False),
        ({"align": Align.ACTIVATION}, True),
        ({"align": Align.WEIGHT}, False),
        (SINGLE_SHOT | {"distance": Distance.WASSERSTEIN}, True),
        (SINGLE_SHOT, False),
        (PRUNE | {"saliency": Saliency.RECONSTRUCTION}, False),
    ],
)
def test_activations_and_overlaps_need_a_sample_of_tokens(asked: dict[str, Any], needs: bool) -> None:
    assert resolve(published(**asked)).needs_sample is needs


# Choices without an effect

IDLE: list[tuple[dict[str, Any], str, Any]] = [
    *((PRUNE, name, value) for name, value in {
        "clustering": Clustering.HIERARCHICAL,
        "similarity": (Similarity.WEIGHT,),
        "distance": Distance.COSINE,
        "linkage": Linkage.SINGLE,
        "kmeans_start": KMeansStart.FIRST,
        "dominant": Dominant.FREQUENCY,
        "max_cluster_size": 2,
        "merge": Merge.AVERAGE,
        "dominant_weights": (2.0, 1.0),
        "features": Features.WEIGHT,
        "align": Align.NONE,
        "align_to": AlignTo.FIRST,
        "router": RouterPolicy.DOMINANT,
    }.items()),
    (RANDOM, "similarity", (Similarity.WEIGHT,)),
    (RANDOM, "distance", Distance.COSINE),
    (RANDOM, "max_cluster_size", 2),
    (FUZZY, "max_cluster_size", 2),
    (FUZZY, "align", Align.WEIGHT),
    *(({"align": align}, "align_to", AlignTo.DOMINANT) for align in (None, Align.NONE)),
    *(({"merge": merge}, "align_to", AlignTo.FIRST) for merge in (Merge.FIX_DOM, Merge.ZIPIT, Merge.NEURONS)),
    (FUZZY, "dominant", Dominant.SALIENCY),
    ({"layout": Layout.FULL}, "dominant", Dominant.CENTER),
    ({"router": RouterPolicy.AVERAGE, "merge": Merge.ZIPIT}, "dominant", Dominant.CENTER),
    ({"align": Align.WEIGHT, "align_to": AlignTo.FIRST, "router": RouterPolicy.AVERAGE}, "dominant", Dominant.CENTER),
    *(({"clustering": clustering}, "linkage", Linkage.AVERAGE) for clustering in (
        Clustering.KMEANS, Clustering.FUZZY, Clustering.SINGLE_SHOT, Clustering.RANDOM
    )),
    *(({"clustering": clustering}, "kmeans_start", KMeansStart.FIRST) for clustering in (
        Clustering.HIERARCHICAL, Clustering.FUZZY, Clustering.SINGLE_SHOT, Clustering.RANDOM
    )),
    *(({"merge": merge}, "features", Features.WEIGHT) for merge in (Merge.FREQUENCY, Merge.AVERAGE, Merge.SALIENCY)),
    (DOMINANT_MERGE, "features", Features.WEIGHT),
    *(({"merge": merge}, "align", Align.WEIGHT) for merge in (Merge.FIX_DOM, Merge.FIX_DOM_ONE_TO_ONE, Merge.ZIPIT)),
    *(({"merge": merge}, "dominant_weights", (2.0, 1.0)) for merge in Merge if merge is not Merge.DOMINANT),
    ({}, "saliency", Saliency.REAP),
    ({}, "propagate", Propagate.MERGED),
    ({"layout": Layout.MAPPED}, "refit", Refit.DOWN),
    ({"refit": Refit.DOWN}, "refit_passes", 2),
    ({"layout": Layout.FULL}, "refit", Refit.NONE),
    ({"layout": Layout.MAPPED}, "router", RouterPolicy.DOMINANT),
    ({"layout": Layout.FULL}, "router", RouterPolicy.FIT),
]  # fmt: skip


@pytest.mark.parametrize(("others", "name", "value"), IDLE, ids=lambda value: str(value)[:40])
def test_a_choice_without_an_effect_is_refused_by_its_name(others: dict[str, Any], name: str, value: Any) -> None:
    error = refused(**others, **{name: value})
    assert error.message.startswith(f"`{name}=")
    assert " would have no effect: " in error.message
    assert error.hint == f"leave `{name}` out"
    assert error.option == name


def test_every_optional_choice_can_be_without_an_effect() -> None:
    optional = {name for name, default in vars_of(MethodOptions()).items() if default is None} - {
        "layers",
        "preset",
        "method",
        "budget",
        "layout",
        "compress",
    }
    assert {name for _, name, _ in IDLE} == optional


# Contradictions

NO_WEIGHTS = [(-1.0, 1.0), (1.0, -0.5), (0.0, 0.0)]
CONTRADICTIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"linkage": Linkage.WARD, "distance": Distance.COSINE}, "cosine distances of expert-output", "`linkage`"),
    ({"linkage": Linkage.WARD, "similarity": BOTH}, "distances of expert-output+weight", "`similarity`"),
    ({"similarity": (Similarity.WEIGHT, Similarity.WEIGHT)}, "names a similarity twice", "`similarity`"),
    ({"distance": Distance.WASSERSTEIN}, "not for hierarchical by expert-output", "`clustering='single-shot'`"),
    (
        SINGLE_SHOT | {"distance": Distance.KL_DIVERGENCE, "similarity": (Similarity.WEIGHT,)},
        "not for single-shot by weight",
        "`similarity='expert-output'`",
    ),
    (SINGLE_SHOT | {"distance": Distance.WASSERSTEIN, "similarity": BOTH}, "by expert-output+weight", "`distance`"),
    ({"merge": Merge.DOMINANT}, "how much the dominant expert weighs", "`dominant_weights=(2, 1)`"),
    *(
        (
            {"merge": Merge.DOMINANT, "dominant_weights": weights},
            "is not a pair of weights",
            "`dominant_weights=(2, 1)`",
        )
        for weights in NO_WEIGHTS
    ),
    (FUZZY | {"merge": Merge.FREQUENCY}, "fuzzy clustering and `merge='frequency'`", "`merge='membership'`"),
    ({"merge": Merge.MEMBERSHIP}, "hierarchical clustering and `merge='membership'`", "`clustering='fuzzy'`"),
    (FUZZY | {"router": RouterPolicy.DOMINANT}, "fuzzy clustering and `router='dominant'`", "`router='membership'`"),
    ({"router": RouterPolicy.MEMBERSHIP}, "hierarchical clustering and `router='membership'`", "`clustering='fuzzy'`"),
    (FUZZY | {"layout": Layout.MAPPED}, "the mapped layout sends every router row to one expert", "`layout='reduced'`"),
    (FUZZY | {"layout": Layout.FULL}, "the full layout sends every router row to one expert", "`clustering`"),
    (SINGLE_SHOT | {"dominant": Dominant.CENTER}, "single-shot grouping has no centres", "`dominant='frequency'`"),
    (RANDOM | {"dominant": Dominant.CENTER}, "random grouping has no centres", "`dominant='frequency'`"),
    (PRUNE | {"layout": Layout.MAPPED}, "would select experts that no longer exist", "`layout='reduced'`"),
    (PRUNE | {"layout": Layout.FULL}, "would select experts that no longer exist", "`layout='reduced'`"),
    ({"max_cluster_size": 0}, "`max_cluster_size`: 0 is too small", "`max_cluster_size`"),
    (
        PRUNE | {"saliency": Saliency.RECONSTRUCTION, "protect": ((0, 1),)},
        "chooses whole subsets of experts",
        "`protect`",
    ),
    (PRUNE | {"budget": Budget.FREQUENCY}, "a frequency budget gives layers different numbers", "`budget='uniform'`"),
    (PRUNE | {"budget": Budget.M_SMOE}, "a m-smoe budget gives layers different numbers", "`budget='uniform'`"),
]


@pytest.mark.parametrize(("asked", "message", "hint"), CONTRADICTIONS, ids=lambda value: str(value)[:60])
def test_choices_that_contradict_each_other_are_refused(asked: dict[str, Any], message: str, hint: str) -> None:
    error = refused(**asked)
    assert message in error.message
    assert hint in error.hint


@pytest.mark.parametrize(
    "asked",
    [
        {"linkage": Linkage.WARD},
        {"linkage": Linkage.WARD, "similarity": (Similarity.ROUTER_LOGITS,)},
        {"similarity": tuple(Similarity)},
        SINGLE_SHOT | {"distance": Distance.KL_DIVERGENCE},
        {"merge": Merge.DOMINANT, "dominant_weights": (1.0, 0.0)},
        {"merge": Merge.DOMINANT, "dominant_weights": (0.0, 1.0)},
        {"merge": Merge.FIX_DOM, "dominant": Dominant.SALIENCY},
        {"max_cluster_size": 1},
        PRUNE | {"protect": ((None, 1),)},
        {"budget": Budget.M_SMOE, "layout": Layout.MAPPED},
    ],
    ids=str,
)
def test_the_neighbours_of_contradictions_are_in_force(asked: dict[str, Any]) -> None:
    assert asked.items() <= chosen(**asked).items()


# All combinations

VALUES: dict[str, list[Any]] = {
    "method": list(Method),
    "similarity": [None, *((one,) for one in Similarity), BOTH, (Similarity.WEIGHT, Similarity.WEIGHT)],
    "distance": [None, *Distance],
    "clustering": [None, *Clustering],
    "linkage": [None, *Linkage],
    "kmeans_start": [None, *KMeansStart],
    "dominant": [None, *Dominant],
    "budget": list(Budget),
    "max_cluster_size": [None, 0, 3],
    "protect": [(), ((None, 0),)],
    "layers": [None, (1,)],
    "merge": [None, *Merge],
    "dominant_weights": [None, (2.0, 1.0), (0.0, 0.0)],
    "features": [None, *Features],
    "align": [None, *Align],
    "align_to": [None, *AlignTo],
    "saliency": [None, *Saliency],
    "refit": [None, *Refit],
    "refit_passes": [None, 1, 4],
    "router": [None, *RouterPolicy],
    "propagate": [None, *Propagate],
    "layout": list(Layout),
    "compress": [None, "32,0.9", "25%"],
    "seed": [42, 7],
}
COMBINATIONS = 10_000


def combinations(at_most: int) -> Iterator[dict[str, Any]]:
    """Random combinations of all values, in which at most so many choices are not the first of their list."""
    generator = random.Random(at_most)
    for _ in range(COMBINATIONS):
        asked = generator.sample(sorted(VALUES), generator.randint(1, at_most))
        yield {name: generator.choice(VALUES[name]) for name in asked}


def outcome(asked: dict[str, Any]) -> Recipe | PlanError:
    """What becomes of some choices."""
    try:
        return resolve(published(**asked))
    except PlanError as error:
        return error


def is_honest(asked: dict[str, Any], found: Recipe | PlanError) -> bool:
    """Whether every choice is in force as asked, or the refusal says which option to change."""
    if isinstance(found, PlanError):
        return "`" in found.hint and "{" not in found.message + found.hint
    return all(value in (None, getattr(found, name)) for name, value in asked.items())


@pytest.mark.parametrize("at_most", [4, len(VALUES)])
def test_every_combination_is_in_force_as_asked_or_refused_with_an_option_to_change(at_most: int) -> None:
    found = [(asked, outcome(asked)) for asked in combinations(at_most)]
    assert [asked for asked, what in found if not is_honest(asked, what)] == []
    recipes = [what for _, what in found if isinstance(what, Recipe)]
    assert 100 < len(recipes) < COMBINATIONS - 100
    # What a report says was done can be asked for, and is done again.
    assert all(resolve(MethodOptions(**vars_of(recipe))) == recipe for recipe in recipes)


def test_every_pair_of_choices_is_in_force_as_asked_or_refused() -> None:
    for first, second in itertools.combinations(VALUES, 2):
        for values in itertools.product(VALUES[first], VALUES[second]):
            asked = dict(zip((first, second), values, strict=True))
            assert is_honest(asked, outcome(asked)), asked


def test_the_lists_above_hold_every_choice_and_every_member() -> None:
    assert VALUES.keys() == {field.name for field in fields(Recipe)}
    enums = [kind for kind in StrEnum.__subclasses__() if kind.__module__ == Method.__module__]
    listed = {type(member) for values in VALUES.values() for member in values if isinstance(member, StrEnum)}
    assert {kind.__name__ for kind in enums} - {kind.__name__ for kind in listed} == {
        "Device",
        "Dtype",
        "FormerRefit",
        "Mtp",
        "Preset",
        "Similarity",
    }
