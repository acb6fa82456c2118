"""Every recipe in one line, and nothing in it that is not in force."""

import pytest

from hcsmoe_hub.cli.method_words import method_line
from hcsmoe_hub.options import (
    Align,
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
from hcsmoe_hub.recipe.resolve import resolve

DEFAULT = "hierarchical clustering by expert-output (euclidean, average linkage), "


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, DEFAULT + "frequency merge, dominant router, reduced layout"),
        ({"method": Method.PRUNE}, "prune by reap"),
        ({"refit": Refit.NONE, "method": Method.PRUNE}, "prune by reap"),
        (
            {"refit": Refit.DOWN},
            DEFAULT + "frequency merge, dominant router, reduced layout, down projections refitted",
        ),
        ({"refit": Refit.EXPERTS, "method": Method.PRUNE}, "prune by reap, experts refitted"),
        ({"refit": Refit.BLOCKS, "method": Method.PRUNE}, "prune by reap, experts and router refitted"),
        (
            {"method": Method.PRUNE, "router": RouterPolicy.FIT, "propagate": Propagate.MERGED},
            "prune by reap, fitted router, fitted on merged hidden states",
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
                "dominant": Dominant.USAGE,
                "align": Align.WEIGHT,
                "max_cluster_size": 3,
            },
            DEFAULT + "at most 3 per cluster, dominant merge 2:0.5, neurons aligned by weight, dominant router, "
            "reduced layout",
        ),
    ],
)
def test_line_names_the_choices_in_force(asked, words):
    assert method_line(resolve(MethodOptions(**asked)).as_dict()) == words


def test_long_list_of_protected_experts_is_counted():
    asked = MethodOptions(protect=tuple((layer, 0) for layer in range(37)))
    assert method_line(resolve(asked).as_dict()).endswith("reduced layout, protected 37 items")


def test_method_of_the_first_version_is_shown_without_what_it_does_not_name():
    method = {
        "similarity": "expert-output",
        "distance": "euclidean",
        "clustering": "hierarchical",
        "linkage": "average",
        "merge": "frequency",
        "router": "dominant",
        "layout": "reduced",
    }
    assert method_line(method) == DEFAULT + "frequency merge, dominant router, reduced layout"
