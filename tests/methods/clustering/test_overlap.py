"""Distances between outputs token by token: the definitions, written out one pair and one token at a time."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy, wasserstein_distance
from torch import Tensor

from hcsmoe_hub.methods.clustering import overlap, overlap_distances
from hcsmoe_hub.options import Distance

OVERLAPS = (Distance.KL_DIVERGENCE, Distance.WASSERSTEIN)


def outputs(experts: int, tokens: int, size: int, *, seed: int) -> Tensor:
    return torch.randn(experts, tokens, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_by_one(outputs_ETH: Tensor, distance: Distance) -> list[list[float]]:
    """The definition, by scipy's own functions of two distributions."""
    softmax, raw = outputs_ETH.softmax(-1).numpy(), outputs_ETH.numpy()
    experts, tokens = raw.shape[:2]

    def of_token(i: int, j: int, token: int) -> float:
        if distance is Distance.WASSERSTEIN:
            return float(wasserstein_distance(raw[i, token], raw[j, token]))
        p, q = softmax[i, token], softmax[j, token]
        return float(entropy(p, q) + entropy(q, p)) / 2

    return [
        [sum(of_token(i, j, token) for token in range(tokens)) / tokens for j in range(experts)] for i in range(experts)
    ]


@pytest.mark.parametrize("distance", OVERLAPS)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_the_distances_are_those_of_the_definition(distance: Distance, scale: float) -> None:
    outputs_ETH = scale * outputs(4, 5, 12, seed=0)
    expected = one_by_one(outputs_ETH, distance)
    assert np.allclose(overlap_distances([outputs_ETH], distance), expected, rtol=1e-9, atol=1e-15)


def test_the_divergence_of_two_known_distributions() -> None:
    outputs_ETH = torch.tensor([[[0.75, 0.25]], [[0.25, 0.75]]]).log()
    # (3/4 - 1/4) (log 3/4 - log 1/4) / 2, twice.
    assert overlap_distances([outputs_ETH], Distance.KL_DIVERGENCE)[0, 1] == pytest.approx(0.5 * math.log(3))


def test_wasserstein_compares_sorted_entries() -> None:
    outputs_ETH = torch.tensor([[[3.0, 1.0, 2.0]], [[1.0, 2.0, 3.0]], [[4.0, 6.0, 5.0]]])
    assert overlap_distances([outputs_ETH], Distance.WASSERSTEIN).tolist() == [[0, 0, 3], [0, 0, 3], [3, 3, 0]]


@pytest.mark.parametrize("distance", OVERLAPS)
def test_how_tokens_are_divided_changes_nothing_but_rounding(
    monkeypatch: pytest.MonkeyPatch, distance: Distance
) -> None:
    outputs_ETH = outputs(5, 17, 6, seed=1)
    whole = overlap_distances([outputs_ETH], distance)
    assert np.allclose(overlap_distances(outputs_ETH.split([1, 9, 7], dim=1), distance), whole, rtol=1e-12, atol=0)
    monkeypatch.setattr(overlap, "BLOCK_ELEMENTS", 70)
    assert np.allclose(overlap_distances([outputs_ETH], distance), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("distance", OVERLAPS)
def test_distances_are_symmetric_with_a_zero_diagonal_and_never_negative(distance: Distance) -> None:
    # Outputs that hardly differ: rounding errors of either sign are as large as the distances.
    outputs_ETH = outputs(1, 3, 50, seed=2) + 1e-9 * outputs(6, 3, 50, seed=3)
    found = overlap_distances([outputs_ETH], distance)
    assert found.dtype == np.float64
    assert (found == found.T).all()
    assert (np.diag(found) == 0).all()
    assert (found >= 0).all()


@pytest.mark.parametrize("distance", OVERLAPS)
def test_equal_experts_are_at_distance_zero(distance: Distance) -> None:
    outputs_ETH = outputs(3, 4, 20, seed=4)[[0, 1, 0, 2]]
    found = overlap_distances([outputs_ETH], distance)
    assert found[0, 2] == pytest.approx(0, abs=1e-14)
    assert found[0, 1] > 0.1


def test_divergences_of_nearly_uniform_outputs_keep_their_digits() -> None:
    # log p is about -7.6 everywhere, the divergences about 1e-14. To first order, they are half the variance of the
    # difference of two outputs.
    outputs_ETH = 1e-7 * outputs(3, 2, 2048, seed=5)
    expected = (outputs_ETH[:, None] - outputs_ETH[None]).var(dim=-1, correction=0).mean(dim=-1) / 2
    found = overlap_distances([outputs_ETH], Distance.KL_DIVERGENCE)
    assert np.allclose(found, expected.numpy(), rtol=1e-5, atol=0)


def test_adding_a_number_to_an_output_changes_its_values_but_not_its_softmax() -> None:
    outputs_ETH = outputs(2, 3, 8, seed=6)
    moved = outputs_ETH + torch.tensor([0.0, 5.0], dtype=torch.float64)[:, None, None]
    before, after = (overlap_distances([each], Distance.KL_DIVERGENCE)[0, 1] for each in (outputs_ETH, moved))
    assert after == pytest.approx(before)
    before, after = (overlap_distances([each], Distance.WASSERSTEIN)[0, 1] for each in (outputs_ETH, moved))
    assert after == pytest.approx(5, abs=before)


@pytest.mark.parametrize("distance", OVERLAPS)
def test_permuting_the_experts_permutes_the_distances(distance: Distance) -> None:
    outputs_ETH = outputs(7, 4, 9, seed=7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(8))
    expected = overlap_distances([outputs_ETH], distance)[np.ix_(order.numpy(), order.numpy())]
    assert np.allclose(overlap_distances([outputs_ETH[order]], distance), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("distance", OVERLAPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_outputs_are_compared_in_float64(distance: Distance, dtype: torch.dtype) -> None:
    outputs_ETH = outputs(4, 3, 10, seed=9).to(dtype)
    assert (overlap_distances([outputs_ETH], distance) == overlap_distances([outputs_ETH.double()], distance)).all()


@pytest.mark.parametrize("distance", OVERLAPS)
def test_no_token_gives_no_distance(distance: Distance) -> None:
    for chunks in ([], [torch.zeros(3, 0, 4)]):
        with pytest.raises(ValueError, match="at least one token"):
            overlap_distances(chunks, distance)


@pytest.mark.parametrize("distance", [Distance.EUCLIDEAN, Distance.COSINE])
def test_distances_between_vectors_are_refused(distance: Distance) -> None:
    with pytest.raises(ValueError, match=distance.value):
        overlap_distances([outputs(2, 2, 2, seed=10)], distance)


def test_a_single_expert_is_at_distance_zero_from_itself() -> None:
    for distance in OVERLAPS:
        assert overlap_distances([outputs(1, 2, 3, seed=11)], distance).tolist() == [[0]]
