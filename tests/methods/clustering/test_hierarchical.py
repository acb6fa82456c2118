"""Hierarchical clustering: the same partition as scipy's, always exactly K clusters, and what no order may change."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from hcsmoe_hub.methods.clustering import Clusters, hierarchical, pairwise_distances
from hcsmoe_hub.options import Distance, Linkage

Array = NDArray[np.float64]

# Linkages that are functions of distances.
LINKAGES = [linkage for linkage in Linkage if linkage is not Linkage.LOSS]


def points(experts: int, size: int, *, seed: int) -> Array:
    return np.random.default_rng(seed).normal(size=(experts, size))


def euclidean(features: Array) -> Array:
    return pairwise_distances(torch.from_numpy(features), Distance.EUCLIDEAN)


def partition(labels: tuple[int, ...], names: Array | None = None) -> set[frozenset[int]]:
    """A partition without numbers or order; ``names`` says which expert stands at every position."""
    positions: dict[int, set[int]] = {}
    for position, label in enumerate(labels):
        positions.setdefault(label, set()).add(position if names is None else int(names[position]))
    return {frozenset(cluster) for cluster in positions.values()}


# The same partition as scipy


def check_against_scipy(experts: int, method: Linkage, *, seed: int) -> None:
    distances = euclidean(points(experts, 16, seed=seed))
    tree = linkage(squareform(distances), method=method.value)
    for clusters in {1, 2, 3, experts // 4, experts // 2, experts - 1, experts}:
        grouping = hierarchical(distances, clusters, method)
        found = grouping.clusters
        assert grouping.tree is not None
        assert (grouping.tree == tree).all()
        assert found.labels == Clusters.of(fcluster(tree, clusters, "maxclust").tolist()).labels
        assert found.heights == tuple(tree[: experts - clusters, 2])


@pytest.mark.parametrize("method", LINKAGES)
@pytest.mark.parametrize("experts", [4, 5, 8, 13, 16, 24, 32, 60, 64])
def test_labels_and_heights_equal_those_of_scipy(experts: int, method: Linkage) -> None:
    for seed in range(5):
        check_against_scipy(experts, method, seed=seed)


@pytest.mark.parametrize("method", LINKAGES)
def test_labels_and_heights_of_256_experts_equal_those_of_scipy(method: Linkage) -> None:
    check_against_scipy(256, method, seed=0)


# The definitions


@pytest.mark.parametrize(
    ("method", "height"),
    [
        (Linkage.SINGLE, 3.0),
        (Linkage.COMPLETE, 6.0),
        (Linkage.AVERAGE, (6 + 4 + 5 + 3) / 4),
        # Centres at 0.5 and 5 on a line: ward's height is sqrt(2 * 2 * 2 / (2 + 2)) * 4.5.
        (Linkage.WARD, 2**0.5 * 4.5),
    ],
)
def test_the_last_height_is_the_linkage_of_the_last_two_clusters(method: Linkage, height: float) -> None:
    # Two pairs on a line: {0, 1} and {4, 6}.
    line = np.array([[0.0], [4.0], [1.0], [6.0]])
    # The single distance of the pairs is 3, the largest 6; the pairs themselves are 1 and 2 wide.
    clusters = hierarchical(euclidean(line), 1, method).clusters
    assert clusters.heights == pytest.approx((1.0, 2.0, height))


def test_single_linkage_follows_a_chain_that_complete_linkage_cuts() -> None:
    # Steps grow, so that nothing is tied: 0, 1, 2.01, 3.03, 4.06, 5.1.
    chain = np.cumsum([0, 1, 1.01, 1.02, 1.03, 1.04])[:, None]
    stray = np.array([[7.0]])
    distances = euclidean(np.concatenate([chain, stray]))
    assert hierarchical(distances, 2, Linkage.SINGLE).clusters.labels == (0, 0, 0, 0, 0, 0, 1)
    assert hierarchical(distances, 2, Linkage.COMPLETE).clusters.labels == (0, 0, 0, 0, 1, 1, 1)


# How many clusters


@pytest.mark.parametrize("method", LINKAGES)
def test_there_are_exactly_k_clusters_for_every_k(method: Linkage) -> None:
    distances = euclidean(points(17, 4, seed=0))
    for clusters in range(1, 18):
        found = hierarchical(distances, clusters, method).clusters
        assert len(found.members) == clusters
        assert len(found.heights) == 17 - clusters


@pytest.mark.parametrize("method", LINKAGES)
def test_there_are_exactly_k_clusters_although_points_coincide(method: Linkage) -> None:
    choose = np.random.default_rng(0)
    for _ in range(20):
        experts = int(choose.integers(2, 14))
        # Few places for many experts: most distances are tied, many are zero.
        distances = euclidean(choose.integers(0, 3, (experts, 2)).astype(float))
        for clusters in range(1, experts + 1):
            found = hierarchical(distances, clusters, method).clusters
            assert len(found.members) == clusters
            assert len(found.heights) == experts - clusters


@pytest.mark.parametrize("method", LINKAGES)
def test_there_are_exactly_k_clusters_although_all_experts_are_equal(method: Linkage) -> None:
    for clusters in range(1, 9):
        found = hierarchical(np.zeros((8, 8)), clusters, method).clusters
        assert len(found.members) == clusters
        assert found.heights == (0.0,) * (8 - clusters)


@pytest.mark.parametrize("method", LINKAGES)
def test_as_many_clusters_as_experts_leaves_everyone_alone_and_merges_nothing(method: Linkage) -> None:
    for experts in (1, 2, 9):
        found = hierarchical(euclidean(points(experts, 3, seed=1)), experts, method).clusters
        assert found == Clusters(labels=tuple(range(experts)), heights=())


@pytest.mark.parametrize("method", LINKAGES)
def test_one_cluster_holds_everyone(method: Linkage) -> None:
    assert hierarchical(euclidean(points(9, 3, seed=2)), 1, method).clusters.labels == (0,) * 9


# What must hold for any input


@pytest.mark.parametrize(
    ("method", "distance"),
    # Ward is defined for Euclidean distances only.
    [
        (method, distance)
        for method in LINKAGES
        for distance in (Distance.EUCLIDEAN, Distance.COSINE)
        if (method, distance) != ("ward", "cosine")
    ],
)
def test_equal_experts_always_meet(method: Linkage, distance: Distance) -> None:
    choose = np.random.default_rng(3)
    for _ in range(20):
        originals = choose.normal(size=(6, 8))
        copied = np.concatenate([np.arange(6), choose.integers(0, 6, 6)])
        choose.shuffle(copied)
        distances = pairwise_distances(torch.from_numpy(originals[copied]), distance)
        for clusters in range(1, 7):
            labels = hierarchical(distances, clusters, method).clusters.labels
            for label, original in zip(labels, copied, strict=True):
                assert label == labels[list(copied).index(original)]


@pytest.mark.parametrize("method", LINKAGES)
def test_permuting_the_experts_permutes_the_partition(method: Linkage) -> None:
    choose = np.random.default_rng(4)
    for seed in range(10):
        features = points(20, 5, seed=seed)
        order = choose.permutation(20)
        for clusters in (2, 7, 15):
            found = hierarchical(euclidean(features), clusters, method).clusters
            permuted = hierarchical(euclidean(features[order]), clusters, method).clusters
            assert partition(permuted.labels, order) == partition(found.labels)
            assert permuted.heights == pytest.approx(found.heights)


@pytest.mark.parametrize("method", LINKAGES)
def test_scaling_all_distances_scales_the_heights_and_nothing_else(method: Linkage) -> None:
    distances = euclidean(points(20, 5, seed=5))
    found, scaled = hierarchical(distances, 6, method).clusters, hierarchical(1024 * distances, 6, method).clusters
    assert scaled.labels == found.labels
    assert scaled.heights == pytest.approx([1024 * height for height in found.heights])


@pytest.mark.parametrize("method", LINKAGES)
def test_fewer_clusters_are_unions_of_more_clusters(method: Linkage) -> None:
    distances = euclidean(points(24, 4, seed=6))
    for clusters in range(1, 24):
        coarse = partition(hierarchical(distances, clusters, method).clusters.labels)
        fine = partition(hierarchical(distances, clusters + 1, method).clusters.labels)
        assert all(any(small <= large for large in coarse) for small in fine)


@pytest.mark.parametrize("method", LINKAGES)
def test_heights_rise_and_begin_with_the_closest_pair(method: Linkage) -> None:
    distances = euclidean(points(24, 4, seed=7))
    heights = hierarchical(distances, 3, method).clusters.heights
    assert list(heights) == sorted(heights)
    assert heights[0] == distances[np.triu_indices(24, 1)].min()


@pytest.mark.parametrize("method", LINKAGES)
def test_the_distances_are_not_changed(method: Linkage) -> None:
    distances = euclidean(points(10, 4, seed=8))
    before = distances.copy()
    hierarchical(distances, 3, method)
    assert (distances == before).all()


@pytest.mark.parametrize("method", LINKAGES)
def test_the_tree_holds_all_merges_however_many_clusters_are_asked_for(method: Linkage) -> None:
    distances = euclidean(points(12, 4, seed=9))
    trees = [hierarchical(distances, clusters, method).tree for clusters in (1, 5, 12)]
    for tree in trees:
        assert tree is not None
        assert tree.shape == (11, 4)
        assert (tree == trees[0]).all()


def test_the_tree_of_a_single_expert_is_empty() -> None:
    tree = hierarchical(np.zeros((1, 1)), 1, Linkage.AVERAGE).tree
    assert tree is not None
    assert tree.shape == (0, 4)
