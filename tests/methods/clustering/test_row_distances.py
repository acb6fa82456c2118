"""Distances over all weights of an expert: the same as over their concatenation, which is never built."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from hcsmoe_hub.methods.clustering import gram, pairwise_distances, row_distances
from hcsmoe_hub.options import Distance

VECTOR_DISTANCES = (Distance.EUCLIDEAN, Distance.COSINE)


def matrices(experts: int, *, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(experts, 6, 10), (experts, 10, 6), (experts, 7)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def concatenated(rows: list[Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten(1) for tensor in rows], dim=1)


@pytest.mark.parametrize("distance", VECTOR_DISTANCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_distances_are_those_of_the_concatenation(dtype: torch.dtype, distance: Distance) -> None:
    rows = matrices(9, seed=0, dtype=dtype)
    expected = pairwise_distances(concatenated(rows), distance)
    assert np.allclose(row_distances(rows, distance), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("distance", VECTOR_DISTANCES)
def test_the_size_of_a_block_changes_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch, distance: Distance) -> None:
    rows = matrices(5, seed=1)
    whole = row_distances(rows, distance)
    for elements in (1, 37, 300):
        monkeypatch.setattr(gram, "BLOCK_ELEMENTS", elements)
        assert np.allclose(row_distances(rows, distance), whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("distance", VECTOR_DISTANCES)
def test_views_with_gaps_are_read_in_their_own_order(distance: Distance) -> None:
    fused = matrices(5, seed=2)[0]
    views = [fused[:, :, :4], fused[:, :, 4:].transpose(1, 2)]
    assert np.allclose(row_distances(views, distance), row_distances([fused], distance), rtol=1e-5, atol=0)


def test_a_tensor_may_hold_one_number_per_expert() -> None:
    assert row_distances([torch.tensor([1.0, 4.0, 4.0])], Distance.EUCLIDEAN).tolist() == [
        [0, 3, 3],
        [3, 0, 0],
        [3, 0, 0],
    ]


@pytest.mark.parametrize("distance", VECTOR_DISTANCES)
def test_equal_experts_are_at_distance_almost_zero(distance: Distance) -> None:
    rows = [tensor[[0, 1, 0, 2, 1]] for tensor in matrices(3, seed=3)]
    found = row_distances(rows, distance)
    scale = found.max()
    assert found[0, 2] < 1e-7 * scale
    assert found[1, 4] < 1e-7 * scale
    assert found[0, 1] > 0.1 * scale


def test_experts_that_are_close_keep_their_distance() -> None:
    # Differences are 1e-7 and 1e-5 of the weights; of products of the weights themselves, even float64 would leave two
    # digits of the first, and float32 none of either.
    base, step = matrices(1, seed=4), matrices(6, seed=5)
    for distance, size in ((Distance.EUCLIDEAN, 1e-4), (Distance.COSINE, 1e-2)):
        rows = [1000 * one + size * many for one, many in zip(base, step, strict=True)]
        expected = pairwise_distances(concatenated(rows), distance)
        assert np.allclose(row_distances(rows, distance), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("distance", VECTOR_DISTANCES)
def test_permuting_the_experts_permutes_the_distances(distance: Distance) -> None:
    rows = matrices(7, seed=6)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(7))
    found = row_distances([tensor[order] for tensor in rows], distance)
    assert np.allclose(found, row_distances(rows, distance)[np.ix_(order.numpy(), order.numpy())], rtol=1e-6, atol=0)


def test_cosine_ignores_length() -> None:
    rows = matrices(6, seed=8)
    longer = [tensor * 4 ** torch.arange(6.0).view(-1, *[1] * (tensor.dim() - 1)) for tensor in rows]
    found = row_distances(longer, Distance.COSINE)
    assert np.allclose(found, row_distances(rows, Distance.COSINE), rtol=1e-5, atol=0)


def test_an_expert_of_zeros_is_as_far_in_cosine_as_orthogonal_ones() -> None:
    rows = matrices(4, seed=9)
    for tensor in rows:
        tensor[2] = 0
    found = row_distances(rows, Distance.COSINE)
    assert found[2] == pytest.approx([1, 1, 0, 1])


def test_tensors_are_asked_for_one_after_the_other() -> None:
    rows = matrices(4, seed=10)

    def offered() -> Iterator[Tensor]:
        for tensor in rows:
            lent = tensor.clone()
            yield lent
            # What is read later is nonsense.
            lent.fill_(1e9)

    for distance in VECTOR_DISTANCES:
        assert (row_distances(offered(), distance) == row_distances(rows, distance)).all()


def test_no_tensor_gives_no_distance() -> None:
    with pytest.raises(ValueError, match="at least one tensor"):
        row_distances([], Distance.EUCLIDEAN)


@pytest.mark.parametrize("distance", [Distance.KL_DIVERGENCE, Distance.WASSERSTEIN])
def test_distances_between_distributions_are_refused(distance: Distance) -> None:
    with pytest.raises(ValueError, match=distance.value):
        row_distances(matrices(3, seed=11), distance)
