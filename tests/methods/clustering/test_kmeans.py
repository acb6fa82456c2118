"""K-means: Lloyd's algorithm from a stated start, never an empty cluster, and sums over representations."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2

from hcsmoe_hub.methods.clustering import Clusters, kmeans
from hcsmoe_hub.methods.clustering.kmeans import plus_plus_seeds
from hcsmoe_hub.options import KMeansStart

Array = NDArray[np.float64]


def points(experts: int, size: int, *, seed: int) -> Array:
    return np.random.default_rng(seed).normal(size=(experts, size))


def families(*, seed: int) -> tuple[Array, NDArray[np.int64]]:
    """24 experts of 4 families that are far apart, in random order."""
    generator = np.random.default_rng(seed)
    family = generator.permutation(np.arange(24) % 4)
    return 10 * np.eye(4)[family] + generator.normal(scale=0.3, size=(24, 4)), family


def error(points_ED: Array, labels: NDArray[np.int64]) -> float:
    """The squared error that Lloyd's algorithm lowers."""
    return sum(
        float(np.square(points_ED[labels == label] - points_ED[labels == label].mean(0)).sum())
        for label in np.unique(labels)
    )


@pytest.mark.parametrize("seed", range(10))
def test_the_first_experts_as_centres_give_the_clusters_of_scipy(seed: int) -> None:
    points_ED = points(30, 6, seed=seed)
    _, expected = kmeans2(points_ED, points_ED[:5], iter=100, minit="matrix")
    assert kmeans([points_ED], 5, KMeansStart.FIRST, 0).tolist() == expected.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_k_means_plus_plus_finds_families_that_are_far_apart(seed: int) -> None:
    points_ED, family = families(seed=seed)
    found = kmeans([points_ED], 4, KMeansStart.PLUS_PLUS, seed)
    assert Clusters.of(found.tolist()) == Clusters.of(family.tolist())


@pytest.mark.parametrize("start", KMeansStart)
def test_everyone_ends_at_the_nearest_centre(start: KMeansStart) -> None:
    for seed in range(5):
        points_ED = points(40, 3, seed=seed)
        labels = kmeans([points_ED], 6, start, seed)
        centres = np.stack([points_ED[labels == label].mean(0) for label in range(6)])
        distances = np.linalg.norm(points_ED[:, None] - centres[None], axis=-1)
        assert (distances.argmin(axis=1) == labels).all()


@pytest.mark.parametrize("start", [KMeansStart.RANDOM, KMeansStart.PLUS_PLUS])
def test_the_seed_decides_the_result(start: KMeansStart) -> None:
    points_ED = points(40, 3, seed=0)
    results = [kmeans([points_ED], 8, start, seed).tolist() for seed in range(6)]
    assert results == [kmeans([points_ED], 8, start, seed).tolist() for seed in range(6)]
    assert len({Clusters.of(labels) for labels in results}) > 1


def test_a_start_from_the_first_experts_needs_no_seed() -> None:
    points_ED = points(40, 3, seed=1)
    assert len({tuple(kmeans([points_ED], 8, KMeansStart.FIRST, seed).tolist()) for seed in range(5)}) == 1


def test_k_means_plus_plus_starts_better_than_random_experts() -> None:
    worse = 0
    for seed in range(20):
        points_ED, _ = families(seed=seed)
        errors = [
            error(points_ED, kmeans([points_ED], 4, start, seed))
            for start in (KMeansStart.RANDOM, KMeansStart.PLUS_PLUS)
        ]
        worse += errors[0] > errors[1] + 1e-9
    assert worse >= 5


@pytest.mark.parametrize("start", KMeansStart)
@pytest.mark.parametrize("clusters", [1, 2, 5, 8, 12])
def test_there_are_exactly_k_clusters_although_points_coincide(start: KMeansStart, clusters: int) -> None:
    for seed in range(10):
        places = np.random.default_rng(seed).integers(0, 2, (12, 2)).astype(float)
        assert set(kmeans([places], clusters, start, seed).tolist()) == set(range(clusters))
    assert set(kmeans([np.zeros((12, 1))], clusters, start, 0).tolist()) == set(range(clusters))


def test_an_empty_cluster_takes_the_expert_that_is_farthest_from_its_centre() -> None:
    # Both centres start at 0, and nobody joins the second; 9 is farthest from it.
    line = np.array([[0.0], [0.0], [1.0], [9.0], [2.0]])
    assert kmeans([line], 2, KMeansStart.FIRST, 0).tolist() == [0, 0, 0, 1, 0]


def test_an_expert_as_near_to_two_centres_joins_the_first() -> None:
    # 1 lies between 0 and 2; whichever centre takes it, the other one is farther afterwards.
    line = np.array([[0.0], [2.0], [1.0]])
    assert kmeans([line], 2, KMeansStart.FIRST, 0).tolist() == [0, 1, 0]


def test_seeds_are_drawn_by_the_square_of_their_distance() -> None:
    line = np.array([[0.0], [1.0], [3.0]])
    draws = [plus_plus_seeds([line], 2, np.random.default_rng(seed)).tolist() for seed in range(3000)]
    after_zero = [second for first, second in draws if first == 0]
    # 9 / (1 + 9), with a standard error of 0.01; distances that are not squared give 0.75.
    assert np.mean(np.equal(after_zero, 2)) == pytest.approx(0.9, abs=0.03)


def test_seeds_are_different_experts_and_never_copies_while_others_are_left() -> None:
    for seed in range(20):
        copied = np.random.default_rng(seed).permutation(np.arange(15) % 5)
        points_ED = points(5, 3, seed=seed)[copied]
        seeds = plus_plus_seeds([points_ED], 5, np.random.default_rng(seed))
        assert set(copied[seeds]) == set(range(5))
        assert len(set(plus_plus_seeds([points_ED], 15, np.random.default_rng(seed)).tolist())) == 15


# Several representations


def test_a_representation_given_twice_changes_nothing() -> None:
    points_ED = points(30, 4, seed=2)
    for start in KMeansStart:
        once, twice = kmeans([points_ED], 5, start, 3), kmeans([points_ED, points_ED], 5, start, 3)
        assert once.tolist() == twice.tolist()


def test_a_representation_that_is_the_same_for_all_changes_nothing() -> None:
    points_ED = points(30, 4, seed=3)
    for start in KMeansStart:
        assert (kmeans([points_ED, np.zeros((30, 1))], 5, start, 0) == kmeans([points_ED], 5, start, 0)).all()


def test_two_representations_together_tell_apart_what_neither_does_alone() -> None:
    generator = np.random.default_rng(4)
    family = np.arange(16) % 4
    first = (10.0 * (family // 2) + generator.normal(scale=0.1, size=16))[:, None]
    second = (10.0 * (family % 2) + generator.normal(scale=0.1, size=16))[:, None]
    found = kmeans([first, second], 4, KMeansStart.FIRST, 0)
    assert Clusters.of(found.tolist()).labels == tuple(family)


def test_distances_are_added_and_not_their_squares() -> None:
    # Expert 2 is at (3, 3) from the first centre and at (5, 0.5) from the second: 6 against 5.5, but 18 against 25.25.
    first, second = np.array([[0.0], [8.0], [3.0]]), np.array([[0.0], [3.5], [3.0]])
    assert kmeans([first, second], 2, KMeansStart.FIRST, 0).tolist() == [0, 1, 1]
