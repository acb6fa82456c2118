"""How far apart experts are: the definition, and the numbers that a careless formula would lose."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hcsmoe_hub.methods.clustering import gram_distances, joined_distances, normalised, pairwise_distances
from hcsmoe_hub.options import Distance

VECTOR_DISTANCES = (Distance.EUCLIDEAN, Distance.COSINE)


def random_features(experts: int, size: int, *, seed: int) -> Tensor:
    return torch.randn(experts, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_euclidean_is_the_length_of_the_difference() -> None:
    distances = pairwise_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 0.0]]), Distance.EUCLIDEAN)
    assert distances.tolist() == [[0, 5, 3], [5, 0, 4], [3, 4, 0]]


def test_cosine_is_one_minus_the_cosine_of_the_angle() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [5.0, 5.0]])
    distances = pairwise_distances(features, Distance.COSINE)
    assert distances[0] == pytest.approx([0, 1, 2, 1 - 0.5**0.5], abs=1e-15)


@pytest.mark.parametrize("distance", VECTOR_DISTANCES)
def test_distances_are_symmetric_with_a_zero_diagonal_and_never_negative(distance: Distance) -> None:
    distances = pairwise_distances(random_features(9, 5, seed=0), distance)
    assert distances.shape == (9, 9)
    assert distances.dtype == np.float64
    assert (distances == distances.T).all()
    assert (np.diag(distances) == 0).all()
    assert (distances >= 0).all()


def test_nearly_equal_large_vectors_keep_their_distance() -> None:
    # |x|^2 - 2xy + |y|^2 has an error of about 1e-16 * |x|^2 = 1e-2 here, ten thousand times the answer squared.
    base = 1e6 * random_features(1, 64, seed=1)
    steps = 1e-4 * random_features(6, 64, seed=2)
    features = base + steps
    distances = pairwise_distances(features, Distance.EUCLIDEAN)
    exact = (features[:, None] - features[None]).square().sum(-1).sqrt().numpy()
    gram = features @ features.T
    squares = gram.diagonal()
    expanded = (squares[:, None] - 2 * gram + squares[None]).clamp(min=0).sqrt().numpy()
    assert np.allclose(distances, exact, rtol=1e-12, atol=0)
    assert not np.allclose(expanded, exact, rtol=0.5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_features_are_compared_in_float64(dtype: torch.dtype) -> None:
    features = random_features(7, 33, seed=3).to(dtype)
    for distance in VECTOR_DISTANCES:
        assert (pairwise_distances(features, distance) == pairwise_distances(features.double(), distance)).all()


def test_half_precision_features_do_not_overflow() -> None:
    features = torch.tensor([[60000.0, 0.0], [-60000.0, 0.0]], dtype=torch.float16)
    assert pairwise_distances(features, Distance.EUCLIDEAN)[0, 1] == 2 * float(features[0, 0])


def test_cosine_ignores_length_and_euclidean_does_not() -> None:
    features = random_features(8, 16, seed=4)
    lengths = torch.linspace(0.01, 100, 8, dtype=torch.float64)[:, None]
    cosine = pairwise_distances(features, Distance.COSINE)
    assert np.allclose(pairwise_distances(features * lengths, Distance.COSINE), cosine, atol=1e-12)
    euclidean = pairwise_distances(features, Distance.EUCLIDEAN)
    assert not np.allclose(pairwise_distances(features * lengths, Distance.EUCLIDEAN), euclidean, rtol=0.1)


def test_euclidean_does_not_change_when_all_experts_are_rotated_or_moved() -> None:
    features = random_features(8, 16, seed=5)
    rotation = torch.linalg.qr(random_features(16, 16, seed=6)).Q
    moved = features @ rotation + random_features(1, 16, seed=7)
    expected = pairwise_distances(features, Distance.EUCLIDEAN)
    assert np.allclose(pairwise_distances(moved, Distance.EUCLIDEAN), expected, rtol=1e-12)


@pytest.mark.parametrize("distance", VECTOR_DISTANCES)
def test_permuting_the_experts_permutes_the_distances(distance: Distance) -> None:
    features = random_features(11, 6, seed=8)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(9))
    expected = pairwise_distances(features, distance)[np.ix_(order.numpy(), order.numpy())]
    assert (pairwise_distances(features[order], distance) == expected).all()


def test_a_zero_vector_is_as_far_in_cosine_from_every_other_as_orthogonal_vectors_are() -> None:
    features = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 5.0], [-1.0, -1.0]])
    distances = pairwise_distances(features, Distance.COSINE)
    assert distances[0].tolist() == [0, 1, 1, 1]
    assert np.isfinite(distances).all()


@pytest.mark.parametrize("distance", VECTOR_DISTANCES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_have_no_distance_that_looks_sound(distance: Distance, value: float) -> None:
    features = random_features(4, 5, seed=10)
    features[2, 1] = value
    distances = pairwise_distances(features, distance)
    assert not np.isfinite(distances[2, [0, 1, 3]]).any()


def test_a_single_expert_is_at_distance_zero_from_itself() -> None:
    for distance in VECTOR_DISTANCES:
        assert pairwise_distances(torch.ones(1, 4), distance).tolist() == [[0]]


@pytest.mark.parametrize("distance", [Distance.KL_DIVERGENCE, Distance.WASSERSTEIN])
def test_distances_between_distributions_are_refused_for_vectors(distance: Distance) -> None:
    features = random_features(3, 4, seed=11)
    with pytest.raises(ValueError, match=distance.value):
        pairwise_distances(features, distance)
    with pytest.raises(ValueError, match=distance.value):
        gram_distances((features @ features.T).numpy(), distance)


# From inner products


@pytest.mark.parametrize("distance", VECTOR_DISTANCES)
def test_inner_products_give_the_distances_of_their_vectors(distance: Distance) -> None:
    features = random_features(12, 40, seed=12)
    features[5] = 0
    found = gram_distances((features @ features.T).numpy(), distance)
    assert np.allclose(found, pairwise_distances(features, distance), rtol=1e-10, atol=1e-14)
    assert (found == found.T).all()
    assert (np.diag(found) == 0).all()


@pytest.mark.parametrize("distance", VECTOR_DISTANCES)
def test_inner_products_of_equal_vectors_never_give_a_negative_or_undefined_distance(distance: Distance) -> None:
    features = random_features(1, 1000, seed=13).expand(6, -1) * (1 + 1e-16 * torch.arange(6.0)[:, None])
    found = gram_distances((features @ features.T).numpy(), distance)
    assert (found >= 0).all()
    assert found.max() < 1e-6


def test_two_vectors_of_length_zero_are_equal_in_cosine_from_inner_products() -> None:
    found = gram_distances(np.diag([0.0, 0.0, 4.0]), Distance.COSINE)
    assert found.tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]


def test_inner_products_that_are_rounded_differently_on_both_sides_give_symmetric_distances() -> None:
    gram = np.array([[2.0, 1.0], [1.0 + 1e-15, 3.0]])
    for distance in VECTOR_DISTANCES:
        found = gram_distances(gram, distance)
        assert found[0, 1] == found[1, 0] > 0


# Several similarities


def test_normalised_distances_have_a_mean_of_one_over_all_pairs() -> None:
    distances = pairwise_distances(random_features(9, 5, seed=14), Distance.EUCLIDEAN)
    found = normalised(distances)
    assert found[np.triu_indices(9, 1)].mean() == pytest.approx(1)
    assert np.allclose(found * distances[0, 1], distances * found[0, 1])


def test_distances_that_are_all_zero_stay_zero() -> None:
    assert normalised(np.zeros((4, 4))).tolist() == np.zeros((4, 4)).tolist()
    assert normalised(np.zeros((1, 1))).tolist() == [[0]]


def test_a_unit_of_one_similarity_does_not_change_joined_distances() -> None:
    first, second = (pairwise_distances(random_features(8, 5, seed=seed), Distance.EUCLIDEAN) for seed in (15, 16))
    joined = joined_distances([first, second])
    assert np.allclose(joined, first / first.sum() * 56 + second / second.sum() * 56)
    assert np.allclose(joined_distances([1e6 * first, second]), joined)


def test_distances_of_a_single_similarity_are_not_scaled() -> None:
    distances = pairwise_distances(random_features(5, 5, seed=17), Distance.EUCLIDEAN)
    assert (joined_distances([distances]) == distances).all()
