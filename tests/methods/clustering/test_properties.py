"""What must hold for every way of grouping, whatever the experts are."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform

from hcsmoe_hub.methods.clustering import (
    Clusters,
    coordinates,
    fuzzy_memberships,
    hard_labels,
    hierarchical,
    kmeans,
    limit_sizes,
    medoids,
    random_groups,
    single_shot,
)
from hcsmoe_hub.options import KMeansStart, Linkage

Array = NDArray[np.float64]
SEEDS = range(8)


def points(experts: int, size: int, *, seed: int) -> Array:
    return np.random.default_rng(seed).normal(size=(experts, size))


def euclidean(features: Array) -> Array:
    return squareform(pdist(features))


def partition(labels: NDArray[np.int64], names: NDArray[np.int64]) -> set[frozenset[int]]:
    """A partition without numbers or order; ``names`` says which expert stands at every position."""
    return {frozenset(names[labels == label].tolist()) for label in np.unique(labels)}


def group(method: str, distances_EE: Array, clusters: int, seed: int) -> NDArray[np.int64]:
    """Labels by any method; single-shot groups around the experts that are farthest from all others."""
    match method:
        case "fuzzy":
            return hard_labels(fuzzy_memberships(coordinates(distances_EE), clusters, seed))
        case "random":
            return random_groups(len(distances_EE), clusters, seed)
        case "single-shot":
            return single_shot(distances_EE, (-distances_EE.sum(axis=1)).argsort(kind="stable")[:clusters].tolist())
        case KMeansStart.PLUS_PLUS | KMeansStart.FIRST | KMeansStart.RANDOM:
            return kmeans([coordinates(distances_EE)], clusters, KMeansStart(method), seed)
        case _:
            return np.array(hierarchical(distances_EE, clusters, Linkage(method)).clusters.labels)


# The loss linkage looks at energies, not at distances: test_loss.py says what holds for it.
LINKAGES = [linkage for linkage in Linkage if linkage is not Linkage.LOSS]
ORDERLESS = [*LINKAGES, "single-shot"]
METHODS = [*ORDERLESS, *KMeansStart, "fuzzy", "random"]


# Order


@pytest.mark.parametrize("method", ORDERLESS)
@pytest.mark.parametrize("seed", SEEDS)
def test_permuting_the_experts_permutes_the_partition(method: str, seed: int) -> None:
    distances_EE = euclidean(points(20, 6, seed=seed))
    order = np.random.default_rng(seed).permutation(20)
    for clusters in (1, 2, 7, 15, 20):
        found = group(method, distances_EE, clusters, 0)
        permuted = group(method, distances_EE[np.ix_(order, order)], clusters, 0)
        assert partition(permuted, order) == partition(found, np.arange(20))


@pytest.mark.parametrize("seed", SEEDS)
def test_permuting_the_experts_permutes_k_means_if_the_first_centres_stay_the_same(seed: int) -> None:
    distances_EE = euclidean(points(20, 6, seed=seed))
    choose = np.random.default_rng(seed)
    for clusters in (1, 2, 7, 15, 20):
        order = np.concatenate([choose.permutation(clusters), clusters + choose.permutation(20 - clusters)])
        found = group(KMeansStart.FIRST, distances_EE, clusters, 0)
        permuted = group(KMeansStart.FIRST, distances_EE[np.ix_(order, order)], clusters, 0)
        assert partition(permuted, order) == partition(found, np.arange(20))


@pytest.mark.parametrize("seed", SEEDS)
def test_permuting_the_experts_permutes_the_partition_within_a_size_limit(seed: int) -> None:
    distances_EE = euclidean(points(18, 5, seed=seed))
    order = np.random.default_rng(seed).permutation(18)
    permuted_EE = distances_EE[np.ix_(order, order)]
    anchors = [1, 4, 9, 12]
    places = [int(np.flatnonzero(order == anchor)[0]) for anchor in anchors]
    for limit in (5, 6, 8):
        found = limit_sizes(distances_EE, single_shot(distances_EE, anchors), anchors, limit)
        permuted = limit_sizes(permuted_EE, single_shot(permuted_EE, places), places, limit)
        assert partition(permuted, order) == partition(found, np.arange(18))


# Equal experts


@pytest.mark.parametrize("method", [*LINKAGES, KMeansStart.PLUS_PLUS])
@pytest.mark.parametrize("seed", SEEDS)
def test_equal_experts_meet_while_there_are_no_more_clusters_than_different_experts(method: str, seed: int) -> None:
    choose = np.random.default_rng(seed)
    copied = choose.permutation(np.concatenate([np.arange(7), choose.integers(0, 7, 9)]))
    distances_EE = euclidean(points(7, 5, seed=seed)[copied])
    for clusters in range(1, 8):
        labels = group(method, distances_EE, clusters, seed)
        for original in range(7):
            assert len(set(labels[copied == original].tolist())) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_equal_experts_that_are_no_seeds_join_the_same_seed(seed: int) -> None:
    choose = np.random.default_rng(seed)
    copied = choose.permutation(np.concatenate([np.arange(7), choose.integers(0, 7, 9)]))
    distances_EE = euclidean(points(7, 5, seed=seed)[copied])
    for clusters in range(1, 16):
        seeds = choose.permutation(16)[:clusters].tolist()
        labels = single_shot(distances_EE, seeds)
        others = np.setdiff1d(np.arange(16), seeds)
        for original in range(7):
            assert len(set(labels[others[copied[others] == original]].tolist())) <= 1


# Numbers of clusters


@pytest.mark.parametrize("method", METHODS)
def test_there_are_exactly_k_clusters_whatever_the_experts_are(method: str) -> None:
    for seed in SEEDS:
        few_places = np.random.default_rng(seed).integers(0, 2, (11, 3)).astype(float)
        for features in (points(11, 4, seed=seed), few_places, np.zeros((11, 2))):
            for clusters in range(1, 12):
                assert len(np.unique(group(method, euclidean(features), clusters, seed))) == clusters


@pytest.mark.parametrize("method", METHODS)
def test_as_many_clusters_as_experts_is_the_identity(method: str) -> None:
    for experts in (1, 2, 9):
        for features in (points(experts, 3, seed=experts), np.zeros((experts, 2))):
            labels = group(method, euclidean(features), experts, 0)
            assert Clusters.of(labels.tolist()).labels == tuple(range(experts))


# Size limits


@pytest.mark.parametrize("method", METHODS)
def test_the_limit_is_never_exceeded_even_where_it_leaves_no_place_free(method: str) -> None:
    for seed in range(4):
        few_places = np.random.default_rng(seed).integers(0, 2, (12, 3)).astype(float)
        for features in (points(12, 4, seed=seed), few_places, np.zeros((12, 2))):
            distances_EE = euclidean(features)
            for clusters in (1, 2, 3, 4, 6, 12):
                labels = group(method, distances_EE, clusters, seed)
                limited = limit_sizes(distances_EE, labels, medoids(distances_EE, labels), 12 // clusters)
                assert np.bincount(limited).tolist() == [12 // clusters] * clusters


@pytest.mark.parametrize("experts", [60, 256])
def test_many_experts_find_a_place_although_all_want_the_same(experts: int) -> None:
    distances_EE = euclidean(points(experts, 8, seed=experts))
    labels = np.zeros(experts, dtype=np.int64)
    labels[: experts // 4] = np.arange(experts // 4)
    limited = limit_sizes(distances_EE, labels, list(range(experts // 4)), 4)
    assert np.bincount(limited).tolist() == [4] * (experts // 4)
