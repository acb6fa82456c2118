"""Fuzzy c-means: memberships that satisfy its two equations, and a hard cluster for everyone."""

import numpy as np
import pytest
from numpy.typing import NDArray

from hcsmoe_hub.methods.clustering import Clusters, fuzzy_memberships, hard_labels

Array = NDArray[np.float64]


def families(experts: int, number: int, *, seed: int, noise: float = 0.3) -> tuple[Array, NDArray[np.int64]]:
    generator = np.random.default_rng(seed)
    family = generator.permutation(np.arange(experts) % number)
    return 5 * np.eye(number)[family] + generator.normal(scale=noise, size=(experts, number)), family


@pytest.mark.parametrize("seed", range(5))
def test_memberships_satisfy_the_equations_of_fuzzy_c_means(seed: int) -> None:
    points_ED, _ = families(20, 4, seed=seed)
    membership_EC = fuzzy_memberships(points_ED, 4, seed)
    weight_EC = membership_EC**2
    centres_CD = (weight_EC.T @ points_ED) / weight_EC.sum(axis=0)[:, None]
    lengths_EC = np.linalg.norm(points_ED[:, None] - centres_CD[None], axis=-1)
    # u_ij = 1 / sum_k (|e_i - c_j| / |e_i - c_k|)^2
    expected = 1 / ((lengths_EC[:, :, None] / lengths_EC[:, None, :]) ** 2).sum(axis=-1)
    assert np.allclose(membership_EC, expected, atol=1e-5)


@pytest.mark.parametrize("clusters", [1, 2, 5, 20])
def test_memberships_of_every_expert_sum_to_one(clusters: int) -> None:
    membership_EC = fuzzy_memberships(families(20, 4, seed=6)[0], clusters, 0)
    assert membership_EC.shape == (20, clusters)
    assert (membership_EC >= 0).all()
    assert np.allclose(membership_EC.sum(axis=1), 1, rtol=1e-12)


def test_families_that_are_far_apart_are_found() -> None:
    for seed in range(5):
        points_ED, family = families(24, 4, seed=seed)
        membership_EC = fuzzy_memberships(points_ED, 4, seed)
        assert membership_EC.max(axis=1).min() > 0.9
        assert Clusters.of(hard_labels(membership_EC).tolist()) == Clusters.of(family.tolist())


def test_an_expert_at_a_centre_belongs_to_it_alone() -> None:
    places = np.array([[0.0], [7.0], [0.0], [9.0]])
    membership_EC = fuzzy_memberships(places, 3, 0)
    assert sorted(membership_EC[[0, 1, 3]].tolist()) == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert membership_EC[0].tolist() == membership_EC[2].tolist()


def test_equal_experts_belong_to_all_clusters_in_equal_parts() -> None:
    membership_EC = fuzzy_memberships(np.zeros((6, 1)), 4, 0)
    assert membership_EC.tolist() == [[0.25] * 4] * 6


def test_the_seed_decides_the_result() -> None:
    points_ED = np.random.default_rng(7).normal(size=(30, 3))
    first, again = (fuzzy_memberships(points_ED, 6, 5) for _ in range(2))
    assert (first == again).all()
    assert any(not np.allclose(first, fuzzy_memberships(points_ED, 6, seed)) for seed in range(4))


def test_the_size_of_the_numbers_does_not_matter() -> None:
    points_ED, _ = families(20, 4, seed=8)
    expected = fuzzy_memberships(points_ED, 4, 0)
    for scale in (2.0**-300, 2.0**300):
        assert np.allclose(fuzzy_memberships(scale * points_ED, 4, 0), expected, rtol=1e-9)


# Hard labels


def test_every_expert_goes_to_its_greatest_membership() -> None:
    assert hard_labels(np.array([[0.2, 0.8], [0.7, 0.3], [0.6, 0.4]])).tolist() == [1, 0, 0]


def test_memberships_that_are_equal_but_for_rounding_go_to_the_first_cluster() -> None:
    assert hard_labels(np.array([[0.9, 0.1], [0.5 - 1e-9, 0.5 + 1e-9], [0.1, 0.9]])).tolist() == [0, 0, 1]


def test_a_cluster_that_nobody_went_to_takes_the_expert_that_belongs_to_it_most() -> None:
    membership_EC = np.array([[0.9, 0.0, 0.1], [0.6, 0.1, 0.3], [0.3, 0.3, 0.4], [0.7, 0.2, 0.1]])
    # Cluster 1 asks for expert 2, who is alone in cluster 2, and takes expert 3.
    assert hard_labels(membership_EC).tolist() == [0, 0, 2, 1]


def test_clusters_that_all_experts_belong_to_alike_take_the_lowest_numbers() -> None:
    assert hard_labels(np.full((5, 3), 1 / 3)).tolist() == [1, 2, 0, 0, 0]


@pytest.mark.parametrize("seed", range(10))
def test_there_are_exactly_k_hard_clusters(seed: int) -> None:
    generator = np.random.default_rng(seed)
    experts = int(generator.integers(1, 12))
    for clusters in range(1, experts + 1):
        membership_EC = generator.dirichlet([0.3] * clusters, size=experts)
        assert set(hard_labels(membership_EC).tolist()) == set(range(clusters))
