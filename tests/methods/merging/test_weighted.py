"""What a cluster becomes: a weighted sum of its members that is rounded once."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hcsmoe_hub.methods.clustering import Clusters
from hcsmoe_hub.methods.merging import merge_rows, weighted
from hcsmoe_hub.methods.merging.shares import equal_shares, proportional_shares

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
NARROW = [torch.bfloat16, torch.float16]
# An integer of the same width shows every bit, where NaN would not even equal itself.
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_rows(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def random_bits(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Every kind of number a dtype has: NaNs of any payload, infinities, subnormals, both zeros."""
    limits = torch.iinfo(BITS[dtype])
    bits = torch.randint(limits.min, limits.max, shape, generator=generator(seed), dtype=BITS[dtype])
    return bits.view(dtype)


def shares_of(clusters: Clusters, weights: Sequence[float]) -> Tensor:
    """Any weight for every expert, in the column of its cluster."""
    share_EC = torch.zeros(len(weights), len(clusters.members), dtype=torch.float64)
    share_EC[torch.arange(len(weights)), torch.tensor(clusters.labels)] = torch.tensor(weights, dtype=torch.float64)
    return share_EC


def exact_sums(rows: Tensor, share_EC: Tensor) -> Tensor:
    """Weighted sums in float64, not rounded."""
    return torch.tensordot(share_EC.T, rows.double(), 1)


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance from each value to the next number that ``dtype`` can hold, for normal numbers."""
    exponent = torch.frexp(values.double()).exponent - 1
    return torch.finfo(dtype).eps * exponent.double().exp2()


# The sum


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_cluster_becomes_the_weighted_sum_of_its_members(dtype: torch.dtype) -> None:
    clusters = Clusters.of([0, 1, 0, 2, 1, 0])
    rows = random_rows(6, 5, 7, dtype=dtype, seed=0)
    share_EC = proportional_shares(clusters, [5, 1, 3, 2, 4, 2])
    merged = merge_rows(rows, share_EC)
    assert merged.shape == (3, 5, 7)
    assert merged.dtype == dtype
    precision = torch.finfo(torch.promote_types(dtype, torch.float32)).eps + torch.finfo(dtype).eps
    assert torch.allclose(merged.double(), exact_sums(rows, share_EC), rtol=precision, atol=4 * precision)


def test_a_merge_by_hand() -> None:
    rows = torch.tensor([[8.0, 0.0], [1.0, 1.0], [0.0, 4.0]])
    assert merge_rows(rows, shares_of(Clusters.of([0, 1, 0]), (0.75, 1.0, 0.25))).tolist() == [[6.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("dtype", NARROW)
def test_the_sum_is_rounded_once(dtype: torch.dtype) -> None:
    clusters = Clusters.of([0] * 8)
    rows = random_rows(8, 4096, dtype=dtype, seed=1)
    share_EC = proportional_shares(clusters, range(1, 9))
    exact = exact_sums(rows, share_EC)
    error = (merge_rows(rows, share_EC).double() - exact).abs()
    # Half a step from the one rounding; the rest is what eight additions in float32 may add.
    float32 = 8 * torch.finfo(torch.float32).eps * exact_sums(rows.abs(), share_EC)
    bound = spacing(exact, dtype) / 2 + float32
    assert (error <= bound).all()

    naive = torch.zeros(1, 4096, dtype=dtype)
    for row, weight in zip(rows, share_EC[:, 0].tolist(), strict=True):
        naive += row * weight
    naive_error = (naive.double() - exact).abs()
    assert (naive_error > bound).float().mean() > 0.2
    assert naive_error.mean() > 1.5 * error.mean()


@pytest.mark.parametrize("dtype", NARROW)
def test_a_rounded_sum_is_almost_always_the_nearest_number(dtype: torch.dtype) -> None:
    clusters = Clusters.of([0, 0, 0])
    rows = random_rows(3, 20_000, dtype=dtype, seed=2)
    share_EC = shares_of(clusters, (0.2, 0.3, 0.5))
    nearest = exact_sums(rows, share_EC).to(dtype)
    assert (merge_rows(rows, share_EC) == nearest).float().mean() > 0.995


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_experts_are_summed_in_their_own_precision(dtype: torch.dtype) -> None:
    clusters = Clusters.of([0] * 16)
    rows = random_rows(16, 1000, dtype=dtype, seed=3)
    share_EC = equal_shares(clusters)
    error = (merge_rows(rows, share_EC).double() - exact_sums(rows, share_EC)).abs().max()
    assert error < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", NARROW)
def test_values_near_the_largest_number_do_not_overflow(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    rows = torch.full((4, 3), largest, dtype=dtype)
    assert (merge_rows(rows, shares_of(Clusters.of([0, 0, 0, 0]), (0.25,) * 4)) == largest).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_merging_equal_experts_gives_their_bits(dtype: torch.dtype) -> None:
    for seed in range(10):
        row = random_rows(1, 999, dtype=dtype, seed=seed)
        usage = torch.randint(1, 1000, (7,), generator=generator(seed)).tolist()
        clusters = Clusters.of([0, 1, 0, 1, 1, 0, 0])
        merged = merge_rows(row.expand(7, -1), proportional_shares(clusters, usage))
        assert torch.equal(merged.view(torch.int16), row.expand(2, -1).contiguous().view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merging_equal_experts_gives_them_up_to_the_last_bits(dtype: torch.dtype) -> None:
    row = random_rows(1, 999, dtype=dtype, seed=4)
    merged = merge_rows(row.expand(3, -1), shares_of(Clusters.of([0, 0, 0]), (0.1, 0.2, 0.7)))
    assert torch.allclose(merged, row, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_cluster_led_by_one_used_expert_is_that_expert(dtype: torch.dtype) -> None:
    rows = random_rows(3, 500, dtype=dtype, seed=5)
    merged = merge_rows(rows, shares_of(Clusters.of([0, 0, 0]), (0.0, 1.0, 0.0)))
    assert torch.equal(merged[0], rows[1])


# Experts that are alone


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_expert_that_is_alone_keeps_its_bits(dtype: torch.dtype) -> None:
    rows = random_bits(5, 3000, dtype=dtype, seed=6)
    clusters = Clusters.of([0, 1, 2, 1, 3])
    merged = merge_rows(rows, equal_shares(clusters))
    for number, expert in ((0, 0), (2, 2), (3, 4)):
        assert torch.equal(merged[number].view(BITS[dtype]), rows[expert].view(BITS[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_many_clusters_as_experts_keeps_every_bit(dtype: torch.dtype) -> None:
    rows = random_bits(4, 6, 50, dtype=dtype, seed=7)
    merged = merge_rows(rows, shares_of(Clusters.of(range(4)), (1.0,) * 4))
    assert torch.equal(merged.view(BITS[dtype]), rows.view(BITS[dtype]))


def test_merged_experts_share_no_memory_with_the_source() -> None:
    rows = torch.ones(2, 4)
    merge_rows(rows, shares_of(Clusters.of([0, 1]), (1.0, 1.0))).zero_()
    assert rows.sum() == 8


def test_the_source_is_not_changed() -> None:
    rows = random_rows(4, 100, dtype=torch.float32, seed=8)
    before = rows.clone()
    merge_rows(rows, shares_of(Clusters.of([0, 0, 1, 0]), (0.2, 0.3, 1.0, 0.5)))
    assert torch.equal(rows, before)


def test_one_member_that_does_not_count_fully_is_scaled() -> None:
    assert merge_rows(torch.tensor([[4.0], [8.0]]), torch.tensor([[0.25], [0.0]])).tolist() == [[1.0]]


def test_an_expert_without_a_share_takes_part_in_nothing() -> None:
    rows = torch.tensor([[1.0], [torch.nan], [3.0], [torch.inf]])
    assert merge_rows(rows, equal_shares(Clusters.of([0, -1, 0, -1]))).tolist() == [[2.0]]


@pytest.mark.parametrize("shape", [(5,), (5, 30), (5, 7, 3), (5, 2, 3, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 16, weighted.BLOCK])
def test_an_expert_may_be_part_of_every_merged_expert(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype, block: int
) -> None:
    monkeypatch.setattr(weighted, "BLOCK", block)
    rows = random_rows(*shape, dtype=dtype, seed=10)
    share_EC = torch.rand(5, 3, generator=generator(11), dtype=torch.float64)
    share_EC /= share_EC.sum(0)
    merged = merge_rows(rows, share_EC)
    assert merged.dtype == dtype
    assert merged.shape == (3, *shape[1:])
    precision = torch.finfo(torch.promote_types(dtype, torch.float32)).eps + torch.finfo(dtype).eps
    assert torch.allclose(merged.double(), exact_sums(rows, share_EC), rtol=precision, atol=4 * precision)


# Shapes and blocks


def test_one_number_per_expert_is_merged_like_a_matrix() -> None:
    merged = merge_rows(torch.tensor([1.0, 2.0, 4.0]), shares_of(Clusters.of([0, 1, 0]), (0.5, 1.0, 0.5)))
    assert merged.tolist() == [2.5, 2.0]


def test_experts_that_do_not_lie_in_one_piece_are_merged_all_the_same() -> None:
    rows = random_rows(3, 40, 5, dtype=torch.float32, seed=9).movedim(2, 0)
    share_EC = shares_of(Clusters.of([0, 1, 0, 1, 0]), (0.5, 0.4, 0.25, 0.6, 0.25))
    assert not rows.is_contiguous()
    merged = merge_rows(rows, share_EC)
    assert merged.is_contiguous()
    assert torch.equal(merged, merge_rows(rows.contiguous(), share_EC))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 64, 65, 127, 128, 129, 1000])
def test_a_sum_in_blocks_has_the_bits_of_a_sum_in_one_piece(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int
) -> None:
    rows = random_rows(6, size, dtype=dtype, seed=size)
    clusters = Clusters.of([0, 1, 0, 0, 2, 1])
    share_EC = proportional_shares(clusters, [3, 1, 4, 1, 5, 9])
    whole = merge_rows(rows, share_EC)
    monkeypatch.setattr(weighted, "BLOCK", 64)
    assert torch.equal(merge_rows(rows, share_EC), whole)


@pytest.mark.parametrize("size", [weighted.BLOCK - 1, weighted.BLOCK, weighted.BLOCK + 1, 2 * weighted.BLOCK + 3])
def test_no_entry_is_lost_at_the_edge_of_a_block(size: int) -> None:
    rows = torch.arange(2 * size, dtype=torch.float64).view(2, size)
    merged = merge_rows(rows, shares_of(Clusters.of([0, 0]), (0.5, 0.5)))
    assert torch.equal(merged[0], torch.arange(size, dtype=torch.float64) + size / 2)
