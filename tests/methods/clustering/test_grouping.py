"""One layer's experts by the method of a recipe: protection, size limits, several similarities, dominant experts."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.methods.clustering import (
    Clusters,
    coordinates,
    dominant_experts,
    fuzzy_memberships,
    group_experts,
    hierarchical,
    joined_distances,
    kmeans,
    limit_sizes,
    normalised,
    random_groups,
    single_shot,
)
from hcsmoe_hub.options import (
    Budget,
    Clustering,
    Distance,
    Dominant,
    KMeansStart,
    Layout,
    Linkage,
    Merge,
    Method,
    RouterPolicy,
    Similarity,
)
from hcsmoe_hub.recipe.recipe import Recipe

Array = NDArray[np.float64]
EXPERTS = 12
SCORE_E = [5, 3, 9, 1, 7, 7, 2, 8, 4, 6, 0, 7]
HARD = [method for method in Clustering if method is not Clustering.FUZZY]


def recipe(clustering: Clustering | None, **choices: Any) -> Recipe:
    base = Recipe(
        method=Method.MERGE,
        similarity=(Similarity.EXPERT_OUTPUT,),
        distance=Distance.EUCLIDEAN,
        clustering=clustering,
        linkage=Linkage.AVERAGE if clustering is Clustering.HIERARCHICAL else None,
        kmeans_start=KMeansStart.PLUS_PLUS if clustering is Clustering.KMEANS else None,
        dominant=Dominant.FREQUENCY,
        budget=Budget.UNIFORM,
        max_cluster_size=None,
        protect=(),
        layers=None,
        merge=Merge.FREQUENCY,
        dominant_weights=None,
        features=None,
        align=None,
        align_to=None,
        saliency=None,
        refit=None,
        refit_passes=None,
        router=RouterPolicy.DOMINANT,
        propagate=None,
        layout=Layout.REDUCED,
        compress=None,
        seed=42,
    )
    return replace(base, **choices)


def distances(*, seed: int, size: int = 4) -> Array:
    return squareform(pdist(np.random.default_rng(seed).normal(size=(EXPERTS, size))))


def without(matrix_EE: Array, experts: set[int]) -> Array:
    kept = [expert for expert in range(len(matrix_EE)) if expert not in experts]
    return matrix_EE[np.ix_(kept, kept)]


# One similarity


def test_every_method_is_the_one_of_its_name() -> None:
    distances_EE = distances(seed=0)

    def labels(clustering: Clustering) -> tuple[int, ...]:
        return group_experts([distances_EE], 4, recipe(clustering), score_E=SCORE_E).clusters.labels

    assert labels(Clustering.HIERARCHICAL) == hierarchical(distances_EE, 4, Linkage.AVERAGE).clusters.labels
    by_centres = kmeans([coordinates(distances_EE)], 4, KMeansStart.PLUS_PLUS, 42)
    assert labels(Clustering.KMEANS) == Clusters.of(by_centres.tolist()).labels
    assert labels(Clustering.RANDOM) == Clusters.of(random_groups(EXPERTS, 4, 42).tolist()).labels
    # The highest scores are those of 2, 7, and of 4 and 5 before 11.
    nearest = np.array([2, 4, 5, 7])[distances_EE[:, [2, 4, 5, 7]].argmin(axis=1)]
    assert labels(Clustering.SINGLE_SHOT) == Clusters.of(nearest.tolist()).labels


def test_hierarchical_groups_come_with_heights_and_tree() -> None:
    found = group_experts([distances(seed=1)], 5, recipe(Clustering.HIERARCHICAL), score_E=SCORE_E)
    assert len(found.clusters.heights) == EXPERTS - 5
    assert found.tree is not None
    assert found.tree.shape == (EXPERTS - 1, 4)


@pytest.mark.parametrize("clustering", [Clustering.KMEANS, Clustering.RANDOM, Clustering.FUZZY])
def test_the_seed_of_the_recipe_decides_the_result(clustering: Clustering) -> None:
    def labels(seed: int) -> tuple[int, ...]:
        chosen = recipe(clustering, seed=seed)
        return group_experts([distances(seed=2)], 6, chosen, score_E=SCORE_E).clusters.labels

    assert [labels(seed) for seed in range(5)] == [labels(seed) for seed in range(5)]
    assert len({labels(seed) for seed in range(5)}) > 1


def test_random_groups_need_no_distances() -> None:
    found = group_experts([], 4, recipe(Clustering.RANDOM), score_E=SCORE_E, protected=frozenset({3}))
    assert len(found.clusters.members) == 4
    assert (3,) in found.clusters.members


def test_columns_of_memberships_are_in_the_order_of_the_clusters() -> None:
    for seed in range(5):
        distances_EE = squareform(pdist(5 * np.eye(4)[np.random.default_rng(seed).permutation(EXPERTS) % 4]))
        distances_EE += 0.01 * distances(seed=seed)
        found = group_experts([distances_EE], 4, recipe(Clustering.FUZZY), score_E=SCORE_E)
        assert found.membership_EC is not None
        assert tuple(found.membership_EC.argmax(axis=1).tolist()) == found.clusters.labels
        plain = fuzzy_memberships(coordinates(distances_EE), 4, 42)
        assert sorted(found.membership_EC.T.tolist()) == sorted(plain.T.tolist())


# Several similarities


@pytest.mark.parametrize("clustering", [Clustering.HIERARCHICAL, Clustering.SINGLE_SHOT, Clustering.FUZZY])
def test_distances_of_several_similarities_are_normalised_and_added(clustering: Clustering) -> None:
    first, second = distances(seed=3), 1000 * distances(seed=4)
    found, expected = (
        group_experts(each, 4, recipe(clustering), score_E=SCORE_E)
        for each in ([first, second], [joined_distances([first, second])])
    )
    assert found.clusters.labels == expected.clusters.labels


def test_k_means_gives_every_similarity_centres_of_its_own() -> None:
    first, second = distances(seed=5), 1000 * distances(seed=6)
    found = group_experts([first, second], 4, recipe(Clustering.KMEANS), score_E=SCORE_E)
    points = [coordinates(normalised(each)) for each in (first, second)]
    assert found.clusters == Clusters.of(kmeans(points, 4, KMeansStart.PLUS_PLUS, 42).tolist())


# Protection


@pytest.mark.parametrize("clustering", Clustering)
@pytest.mark.parametrize("protected", [{0}, {11}, {2, 5, 6}])
def test_protected_experts_stay_alone_and_the_others_share_the_rest(
    clustering: Clustering, protected: set[int]
) -> None:
    distances_EE = distances(seed=7)
    chosen = recipe(clustering)
    found = group_experts([distances_EE], 6, chosen, score_E=SCORE_E, protected=frozenset(protected))
    assert len(found.clusters.members) == 6
    assert found.clusters == Clusters.of(found.clusters.labels, found.clusters.heights)
    assert {(expert,) for expert in protected} <= set(found.clusters.members)
    rest = [expert for expert in range(EXPERTS) if expert not in protected]
    expected = group_experts(
        [without(distances_EE, protected)], 6 - len(protected), chosen, score_E=[SCORE_E[expert] for expert in rest]
    )
    together = {tuple(rest[expert] for expert in members) for members in expected.clusters.members}
    assert set(found.clusters.members) == together | {(expert,) for expert in protected}
    assert found.clusters.heights == expected.clusters.heights
    assert found.tree is None


def test_a_protected_expert_belongs_to_its_fuzzy_cluster_and_to_no_other() -> None:
    found = group_experts(
        [distances(seed=8)], 5, recipe(Clustering.FUZZY), score_E=SCORE_E, protected=frozenset({0, 4})
    )
    assert found.membership_EC is not None
    assert np.allclose(found.membership_EC.sum(axis=1), 1)
    for expert in (0, 4):
        own = found.clusters.labels[expert]
        assert found.membership_EC[expert].tolist() == np.eye(5)[own].tolist()
        assert found.membership_EC[:, own].tolist() == np.eye(EXPERTS)[expert].tolist()
    others = [expert for expert in range(EXPERTS) if expert not in (0, 4)]
    assert (found.membership_EC[others] > 0).sum() == len(others) * 3


def test_as_many_protected_experts_as_clusters_leave_none_for_the_others() -> None:
    for protected in (range(4), range(EXPERTS)):
        with pytest.raises(PlanError, match=f"{len(protected)} of 12 experts are protected: 4 clusters"):
            group_experts(
                [distances(seed=9)],
                4,
                recipe(Clustering.HIERARCHICAL),
                score_E=SCORE_E,
                protected=frozenset(protected),
            )


# Bounds


@pytest.mark.parametrize("clustering", Clustering)
@pytest.mark.parametrize("protected", [set(), {3}, set(range(EXPERTS))])
def test_as_many_clusters_as_experts_leave_everyone_alone(clustering: Clustering, protected: set[int]) -> None:
    for distances_EE in (distances(seed=10), np.zeros((EXPERTS, EXPERTS))):
        found = group_experts(
            [distances_EE], EXPERTS, recipe(clustering), score_E=SCORE_E, protected=frozenset(protected)
        )
        assert found.clusters == Clusters(labels=tuple(range(EXPERTS)))
        assert (found.tree is not None) == (clustering is Clustering.HIERARCHICAL)
        if clustering is Clustering.FUZZY:
            assert found.membership_EC is not None
            assert found.membership_EC.tolist() == np.eye(EXPERTS).tolist()
        else:
            assert found.membership_EC is None


@pytest.mark.parametrize("count", [-1, 0, 13])
def test_more_clusters_than_experts_or_none_are_refused(count: int) -> None:
    with pytest.raises(PlanError, match=f"12 experts cannot form {count} clusters"):
        group_experts([distances(seed=11)], count, recipe(Clustering.HIERARCHICAL), score_E=SCORE_E)


def test_a_recipe_without_clustering_groups_nothing() -> None:
    with pytest.raises(ValueError, match="clusters no experts"):
        group_experts([distances(seed=12)], 4, recipe(None), score_E=SCORE_E)


# Size limits


@pytest.mark.parametrize("clustering", HARD)
@pytest.mark.parametrize("limit", [3, 4, 6])
def test_no_cluster_exceeds_the_limit_of_the_recipe(clustering: Clustering, limit: int) -> None:
    for seed in range(5):
        chosen = recipe(clustering, max_cluster_size=limit)
        found = group_experts([distances(seed=seed)], 4, chosen, score_E=SCORE_E)
        assert max(len(members) for members in found.clusters.members) <= limit
        assert len(found.clusters.members) == 4


def test_a_limit_that_moves_nobody_keeps_heights_and_one_that_does_drops_them() -> None:
    distances_EE = np.abs(np.subtract.outer(np.arange(12.0) ** 1.5, np.arange(12.0) ** 1.5))
    free = group_experts([distances_EE], 4, recipe(Clustering.HIERARCHICAL), score_E=SCORE_E)
    largest = max(len(members) for members in free.clusters.members)
    loose, tight = (
        group_experts([distances_EE], 4, recipe(Clustering.HIERARCHICAL, max_cluster_size=limit), score_E=SCORE_E)
        for limit in (largest, largest - 1)
    )
    assert loose.clusters == free.clusters
    assert tight.clusters.labels != free.clusters.labels
    assert tight.clusters.heights == ()


def test_a_limit_keeps_the_seeds_of_single_shot_grouping_apart() -> None:
    chosen = recipe(Clustering.SINGLE_SHOT, max_cluster_size=3)
    for seed in range(5):
        distances_EE, seeds = distances(seed=seed), [2, 7, 4, 5]
        found = group_experts([distances_EE], 4, chosen, score_E=SCORE_E)
        assert len({found.clusters.labels[expert] for expert in seeds}) == 4
        expected = limit_sizes(distances_EE, single_shot(distances_EE, seeds), seeds, 3)
        assert found.clusters == Clusters.of(expected.tolist())


# Dominant experts


def test_the_dominant_expert_has_the_highest_score() -> None:
    clusters = Clusters.of([0, 0, 1, 1, 1, 0])
    score_E = [1, 3, 5, 9, 9, 2]
    for rule in (Dominant.FREQUENCY, Dominant.ROUTING_SCORE, Dominant.SALIENCY):
        assert dominant_experts(clusters, np.zeros((6, 6)), rule, score_E=score_E) == (1, 3)


def test_the_center_is_the_member_nearest_to_the_mean_of_its_cluster() -> None:
    for seed in range(10):
        features = np.random.default_rng(seed).normal(size=(EXPERTS, 5))
        clusters = Clusters.of([expert % 3 for expert in range(EXPERTS)])
        found = dominant_experts(clusters, squareform(pdist(features)), Dominant.CENTER, score_E=SCORE_E)
        for members, expert in zip(clusters.members, found, strict=True):
            lengths = np.linalg.norm(features[list(members)] - features[list(members)].mean(axis=0), axis=1)
            assert members[int(lengths.argmin())] == expert


def test_the_lower_of_two_members_is_the_center_and_a_single_one_its_own() -> None:
    distances_EE = distances(seed=13)
    # Rounding on one side only must not decide.
    distances_EE[3, 1] *= 1 + 1e-12
    distances_EE[0, 4] *= 1 + 1e-12
    clusters = Clusters.of([0, 1, 2, 1, 0, *[2] * 7])
    assert dominant_experts(clusters, distances_EE, Dominant.CENTER, score_E=SCORE_E)[:2] == (0, 1)
    alone = Clusters.of(range(EXPERTS))
    assert dominant_experts(alone, distances_EE, Dominant.CENTER, score_E=SCORE_E) == tuple(range(EXPERTS))
