"""Points from distances: exact where there are such points, the closest in the sense of classical scaling otherwise."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform

from hcsmoe_hub.methods.clustering import coordinates, pairwise_distances
from hcsmoe_hub.options import Distance

Array = NDArray[np.float64]


def points(experts: int, size: int, *, seed: int) -> Array:
    return np.random.default_rng(seed).normal(size=(experts, size))


def distances_of(found: Array) -> Array:
    return squareform(pdist(found))


@pytest.mark.parametrize("size", [1, 3, 8, 50])
def test_euclidean_distances_are_met_exactly(size: int) -> None:
    distances = distances_of(points(10, size, seed=0))
    found = coordinates(distances)
    assert np.allclose(distances_of(found), distances, rtol=1e-9, atol=1e-9)
    assert found.shape == (10, min(size, 9))


def test_the_points_lie_around_zero_with_the_widest_direction_first() -> None:
    found = coordinates(distances_of(points(12, 5, seed=1) * [5, 1, 3, 2, 4]))
    assert np.allclose(found.mean(axis=0), 0, atol=1e-12)
    widths = found.std(axis=0)
    assert list(widths) == sorted(widths, reverse=True)


def test_means_of_points_are_as_far_apart_as_means_of_features() -> None:
    features = points(10, 4, seed=2)
    found = coordinates(distances_of(features))
    first, second = [0, 3, 4], [1, 2, 7, 9]
    expected = np.linalg.norm(features[first].mean(0) - features[second].mean(0))
    assert np.linalg.norm(found[first].mean(0) - found[second].mean(0)) == pytest.approx(expected)


def test_the_largest_entry_of_every_direction_is_positive() -> None:
    for seed in range(10):
        found = coordinates(distances_of(points(9, 6, seed=seed)))
        assert (found.max(axis=0) >= -found.min(axis=0)).all()


def test_equal_experts_meet_in_one_point() -> None:
    features = points(4, 6, seed=3)[[0, 1, 0, 2, 3, 1]]
    found = coordinates(distances_of(features))
    assert np.allclose(found[0], found[2], atol=1e-7)
    assert np.allclose(found[1], found[5], atol=1e-7)


def test_experts_that_are_all_equal_lie_at_zero() -> None:
    assert coordinates(np.zeros((5, 5))).tolist() == [[0.0]] * 5
    assert coordinates(np.zeros((1, 1))).tolist() == [[0.0]]


def test_permuting_the_experts_moves_no_point() -> None:
    distances = distances_of(points(11, 4, seed=4))
    order = np.random.default_rng(5).permutation(11)
    assert np.allclose(coordinates(distances[np.ix_(order, order)]), coordinates(distances)[order], atol=1e-9)


def test_distances_without_such_points_are_met_as_far_as_their_positive_part_goes() -> None:
    # Three experts at distance 2 from each other, and one at distance 1 from all: its place would be imaginary.
    distances = np.full((4, 4), 2.0) - 2 * np.eye(4)
    distances[3, :3] = distances[:3, 3] = 1.0
    found = coordinates(distances)
    assert np.isfinite(found).all()
    assert np.allclose(distances_of(found)[:3, :3], distances[:3, :3])
    assert found[3] == pytest.approx(np.zeros(found.shape[1]), abs=1e-9)


def test_cosine_distances_keep_families_apart() -> None:
    families = np.repeat(points(3, 20, seed=6), 4, axis=0) + 0.1 * points(12, 20, seed=7)
    distances = pairwise_distances(torch.from_numpy(families), Distance.COSINE)
    embedded = distances_of(coordinates(distances))
    together = np.equal.outer(np.arange(12) // 4, np.arange(12) // 4)
    assert embedded[together].max() < embedded[~together].min()
