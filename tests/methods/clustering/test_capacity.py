"""Clusters of a limited size: within the limit, at the least cost, and unchanged where nothing is too large."""

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.methods.clustering import limit_sizes, medoids

Array = NDArray[np.float64]


def distances(experts: int, *, seed: int) -> Array:
    return squareform(pdist(np.random.default_rng(seed).normal(size=(experts, 3))))


def cost(distances_EE: Array, labels: NDArray[np.int64], anchors: list[int]) -> float:
    return float(distances_EE[np.arange(len(labels)), np.array(anchors)[labels]].sum())


@pytest.mark.parametrize("seed", range(20))
def test_the_limit_is_never_exceeded_and_anchors_stay(seed: int) -> None:
    generator = np.random.default_rng(seed)
    experts, clusters = 24, int(generator.integers(2, 9))
    anchors = generator.permutation(experts)[:clusters].tolist()
    labels = generator.integers(clusters, size=experts)
    labels[anchors] = np.arange(clusters)
    for limit in range(-(-experts // clusters), experts + 1):
        found = limit_sizes(distances(experts, seed=seed), labels, anchors, limit)
        assert np.bincount(found, minlength=clusters).max() <= limit
        assert found[anchors].tolist() == list(range(clusters))


def test_no_other_assignment_within_the_limit_is_cheaper() -> None:
    for seed in range(5):
        distances_EE, anchors = distances(7, seed=seed), [4, 0]
        found = limit_sizes(distances_EE, np.array([1, 0, 0, 0, 0, 0, 0]), anchors, 4)
        allowed = [
            labels
            for labels in (np.array(choice) for choice in product(range(2), repeat=7))
            if labels[4] == 0 and labels[0] == 1 and np.bincount(labels).max() <= 4
        ]
        assert cost(distances_EE, found, anchors) == pytest.approx(
            min(cost(distances_EE, each, anchors) for each in allowed)
        )


def test_clusters_within_the_limit_stay_as_they_are() -> None:
    # The nearest anchor of every expert is another one.
    distances_EE = squareform(pdist(np.array([[0.0], [10.0], [9.0], [1.0]])))
    assert limit_sizes(distances_EE, np.array([0, 1, 0, 1]), [0, 1], 2).tolist() == [0, 1, 0, 1]
    assert limit_sizes(distances_EE, np.array([0, 1, 0, 0]), [0, 1], 2).tolist() == [0, 1, 1, 0]


def test_the_labels_are_not_changed_in_place() -> None:
    labels = np.array([0, 0, 0, 1])
    limit_sizes(distances(4, seed=0), labels, [0, 3], 2)[:] = 7
    limit_sizes(distances(4, seed=0), labels, [0, 3], 3)[:] = 7
    assert labels.tolist() == [0, 0, 0, 1]


def test_a_limit_that_leaves_just_enough_room_fills_every_cluster() -> None:
    found = limit_sizes(np.zeros((12, 12)), np.array([0] * 9 + [1, 2, 3]), [0, 9, 10, 11], 3)
    assert np.bincount(found).tolist() == [3, 3, 3, 3]


def test_a_limit_without_room_for_everyone_is_refused_with_the_numbers() -> None:
    with pytest.raises(PlanError, match="3 clusters of at most 2 experts cannot hold 7 experts") as refused:
        limit_sizes(np.zeros((7, 7)), np.array([0, 1, 2, 0, 0, 0, 0]), [0, 1, 2], 2)
    assert "at least 3" in refused.value.hint


def test_an_enormous_limit_costs_nothing() -> None:
    labels = np.array([0, 0, 0, 1])
    assert limit_sizes(distances(4, seed=1), labels, [0, 3], 10**12).tolist() == labels.tolist()


def test_the_medoid_is_the_member_with_the_least_distance_to_the_others() -> None:
    # Of 1, 1.2 and 1.5 on the way to 9, the last is nearest to the farthest member, but the second to all together.
    distances_EE = squareform(pdist(np.array([[0.0], [20.0], [1.0], [1.2], [1.5], [9.0], [21.0]])))
    assert medoids(distances_EE, np.array([0, 1, 0, 0, 0, 0, 1])) == (3, 1)


def test_the_lowest_number_is_the_medoid_among_equals() -> None:
    assert medoids(distances(4, seed=2), np.array([0, 1, 1, 0])) == (0, 1)
    assert medoids(np.zeros((4, 4)), np.array([0, 1, 1, 1])) == (0, 1)
