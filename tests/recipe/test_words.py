"""Every recipe in words, and nothing in them that is not in force."""

import pytest

from hcsmoe_hub import options
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.options import (
    Align,
    AlignTo,
    Budget,
    Clustering,
    Distance,
    Dominant,
    Features,
    FormerRefit,
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
from hcsmoe_hub.recipe import words
from hcsmoe_hub.recipe.presets import PRESETS
from hcsmoe_hub.recipe.read import read_recipe
from hcsmoe_hub.recipe.resolve import resolve
from hcsmoe_hub.recipe.words import method_line

DEFAULT = "hierarchical clustering by expert-output (euclidean, average linkage), "


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({}, DEFAULT + "frequency merge, dominant router, reduced layout"),
        ({"method": Method.PRUNE}, "prune by reap"),
        ({"refit": Refit.NONE, "method": Method.PRUNE}, "prune by reap"),
        (
            {"refit": Refit.DOWN},
            DEFAULT + "frequency merge, dominant router, reduced layout, down projections refitted",
        ),
        ({"refit": Refit.BLOCK, "method": Method.PRUNE}, "prune by reap, experts and router refitted"),
        (
            {"method": Method.PRUNE, "router": RouterPolicy.FIT, "propagate": Propagate.MERGED},
            "prune by reap, fitted router, refitted on merged hidden states",
        ),
        ({"method": Method.PRUNE, "router": RouterPolicy.FIT}, "prune by reap, fitted router"),
        ({"router": RouterPolicy.FIT}, DEFAULT + "frequency merge, fitted router, reduced layout"),
        (
            {"clustering": Clustering.FUZZY, "router": RouterPolicy.FIT},
            "fuzzy clustering by expert-output (euclidean), membership merge, fitted router, reduced layout",
        ),
        (
            {"method": Method.PRUNE, "saliency": Saliency.FREQUENCY, "protect": ((1, 2), (None, 0))},
            "prune by frequency, protected 1:2,*:0",
        ),
        (
            {
                "clustering": Clustering.SINGLE_SHOT,
                "similarity": (Similarity.ROUTER_LOGITS,),
                "budget": Budget.M_SMOE,
                "layout": Layout.FULL,
            },
            "single-shot around most used experts by router-logits (cosine), m-smoe budget, frequency merge, "
            "full layout",
        ),
        (
            {"clustering": Clustering.SINGLE_SHOT, "dominant": Dominant.SALIENCY, "distance": Distance.WASSERSTEIN},
            "single-shot around most salient experts by expert-output (wasserstein), frequency merge, dominant router, "
            "reduced layout",
        ),
        (
            {
                "clustering": Clustering.KMEANS,
                "kmeans_start": KMeansStart.FIRST,
                "similarity": (Similarity.WEIGHT, Similarity.EXPERT_OUTPUT),
                "router": RouterPolicy.AVERAGE,
            },
            "kmeans clustering by weight+expert-output (euclidean, first start), frequency merge, average router, "
            "reduced layout",
        ),
        (
            {"clustering": Clustering.FUZZY},
            "fuzzy clustering by expert-output (euclidean), membership merge, reduced layout",
        ),
        (
            {"clustering": Clustering.RANDOM, "merge": Merge.AVERAGE, "layout": Layout.MAPPED, "layers": (0, 1, 2, 5)},
            "random groups, average merge, mapped layout, layers 0-2,5",
        ),
        (
            {"linkage": Linkage.WARD, "merge": Merge.FIX_DOM, "features": Features.ACTIVATION_WEIGHT},
            "hierarchical clustering by expert-output (euclidean, ward linkage), fix-dom merge by activation+weight, "
            "dominant by center, dominant router, reduced layout",
        ),
        (
            {
                "merge": Merge.DOMINANT,
                "dominant_weights": (2.0, 0.5),
                "dominant": Dominant.FREQUENCY,
                "align": Align.WEIGHT,
                "max_cluster_size": 3,
            },
            DEFAULT + "at most 3 per cluster, dominant merge 2:0.5, neurons aligned by weight, dominant router, "
            "reduced layout",
        ),
        (
            {"align": Align.ACTIVATION, "align_to": AlignTo.FIRST},
            DEFAULT + "frequency merge, neurons aligned to the first expert by activation, dominant router, "
            "reduced layout",
        ),
    ],
)
def test_line_names_the_choices_in_force(asked, line):
    assert method_line(resolve(MethodOptions(preset=Preset.HC_SMOE, **asked))) == line


def test_long_list_of_protected_experts_is_counted():
    asked = MethodOptions(preset=Preset.HC_SMOE, protect=tuple((layer, 0) for layer in range(37)))
    assert method_line(resolve(asked)).endswith("reduced layout, protected 37 items")


WORDS = {
    options.Similarity: words.SIMILARITIES,
    options.Distance: words.DISTANCES,
    options.Clustering: words.CLUSTERINGS,
    options.Dominant: words.LEADERS,
    options.Budget: words.BUDGETS,
    options.Merge: words.MERGES,
    options.Features: words.FEATURES,
    options.Align: words.ALIGNMENTS,
    options.AlignTo: words.ANCHORS,
    options.Saliency: words.SALIENCIES,
    options.RouterPolicy: words.ROUTERS,
    options.Refit: words.REFITS,
    options.Propagate: words.PROPAGATIONS,
}


def test_every_value_of_every_choice_has_words():
    assert {kind: set(records) - set(FormerRefit) for kind, records in WORDS.items()} == {
        kind: set(kind) for kind in WORDS
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_a_recipe_is_read_back_from_what_a_report_records(preset):
    asked = [PRESETS[preset], MethodOptions(protect=((None, 2), (3, 1)), layers=(1, 2))]
    for recipe in map(resolve, asked):
        # As JSON has it: lists, not tuples.
        record = {name: list(value) if isinstance(value, tuple) else value for name, value in recipe.as_dict().items()}
        assert read_recipe(record) == recipe


@pytest.mark.parametrize("align", Align)
def test_a_report_without_the_anchor_of_an_alignment_means_the_dominant_expert(align):
    recipe = resolve(MethodOptions(align=align))
    record = {name: value for name, value in recipe.as_dict().items() if name != "align_to"}
    assert read_recipe(record) == read_recipe(record | {"align_to": None}) == recipe
    assert ("align_to" in recipe.as_dict()) is (align is not Align.NONE)


def test_the_card_names_the_expert_that_others_are_aligned_to():
    to_first = words.merging(resolve(PRESETS[Preset.M_SMOE]))
    assert to_first.endswith("neurons were permuted towards the first expert of the layer by their weights")
    to_dominant = words.merging(resolve(MethodOptions(align=Align.ACTIVATION)))
    assert to_dominant.endswith("neurons were permuted towards the dominant expert by their activations")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"router": "oracle"}, "the report names the router 'oracle', which this version of hcsmoe does not know."),
        ({"similarity": "weight+aura"}, "the report names the similarity 'aura', which"),
        ({"protect": "1:2:3"}, "the report protects the experts '1:2:3', which is not a list of LAYER:EXPERT."),
    ],
)
def test_a_choice_of_a_later_version_is_refused(changes, problem):
    with pytest.raises(SourceError) as caught:
        read_recipe(resolve(MethodOptions()).as_dict() | changes)
    assert caught.value.message.startswith(problem)
