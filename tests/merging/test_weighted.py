"""What a cluster becomes: the shares of its members, and a weighted sum that is rounded once."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hcsmoe_hub.clustering import Clusters
from hcsmoe_hub.merging import member_weights, merge_rows, weighted
from hcsmoe_hub.options import Merge

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


def exact_sums(rows: Tensor, clusters: Clusters, weights: Sequence[float]) -> Tensor:
    """Weighted sums in float64, not rounded."""
    shares = torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * (rows.dim() - 1))
    return torch.stack([(rows.double() * shares)[list(members)].sum(0) for members in clusters.members])


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance from each value to the next number that ``dtype`` can hold, for normal numbers."""
    exponent = torch.frexp(values.double()).exponent - 1
    return torch.finfo(dtype).eps * exponent.double().exp2()


# The shares


def test_frequency_weights_are_shares_of_the_tokens_of_a_cluster() -> None:
    clusters = Clusters.of([0, 1, 0, 1, 1])
    assert member_weights(clusters, [30, 1, 10, 2, 5], Merge.FREQUENCY) == (0.75, 0.125, 0.25, 0.25, 0.625)


def test_average_weights_do_not_ask_for_tokens() -> None:
    clusters = Clusters.of([0, 1, 0, 1, 1])
    expected = pytest.approx((1 / 2, 1 / 3, 1 / 2, 1 / 3, 1 / 3))
    assert member_weights(clusters, [30, 1, 10, 2, 5], Merge.AVERAGE) == expected


@pytest.mark.parametrize("merge", Merge)
def test_the_members_of_a_cluster_that_no_token_reached_count_equally(merge: Merge) -> None:
    clusters = Clusters.of([0, 1, 0, 1, 0, 0])
    weights = member_weights(clusters, [0, 3, 0, 1, 0, 0], merge)
    assert [weights[expert] for expert in (0, 2, 4, 5)] == [0.25] * 4


def test_an_unused_member_of_a_used_cluster_counts_nothing() -> None:
    assert member_weights(Clusters.of([0, 0, 0]), [0, 6, 2], Merge.FREQUENCY) == (0, 0.75, 0.25)


@pytest.mark.parametrize("merge", Merge)
def test_an_expert_that_is_alone_counts_fully(merge: Merge) -> None:
    weights = member_weights(Clusters.of([0, 1, 2, 1]), [0, 5, 7, 9], merge)
    assert (weights[0], weights[2]) == (1, 1)


@pytest.mark.parametrize("merge", Merge)
def test_the_shares_of_every_cluster_sum_to_one(merge: Merge) -> None:
    for seed in range(20):
        labels = torch.randint(0, 5, (16,), generator=generator(seed))
        usage = torch.randint(0, 3, (16,), generator=generator(100 + seed)).tolist()
        clusters = Clusters.of(labels.tolist())
        weights = member_weights(clusters, usage, merge)
        for members in clusters.members:
            assert sum(weights[expert] for expert in members) == pytest.approx(1, abs=1e-12)
            assert all(weights[expert] >= 0 for expert in members)


# The sum


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_cluster_becomes_the_weighted_sum_of_its_members(dtype: torch.dtype) -> None:
    clusters = Clusters.of([0, 1, 0, 2, 1, 0])
    rows = random_rows(6, 5, 7, dtype=dtype, seed=0)
    weights = member_weights(clusters, [5, 1, 3, 2, 4, 2], Merge.FREQUENCY)
    merged = merge_rows(rows, clusters, weights)
    assert merged.shape == (3, 5, 7)
    assert merged.dtype == dtype
    precision = torch.finfo(torch.promote_types(dtype, torch.float32)).eps + torch.finfo(dtype).eps
    assert torch.allclose(merged.double(), exact_sums(rows, clusters, weights), rtol=precision, atol=4 * precision)


def test_a_merge_by_hand() -> None:
    rows = torch.tensor([[8.0, 0.0], [1.0, 1.0], [0.0, 4.0]])
    assert merge_rows(rows, Clusters.of([0, 1, 0]), (0.75, 1.0, 0.25)).tolist() == [[6.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("dtype", NARROW)
def test_the_sum_is_rounded_once(dtype: torch.dtype) -> None:
    clusters = Clusters.of([0] * 8)
    rows = random_rows(8, 4096, dtype=dtype, seed=1)
    weights = member_weights(clusters, list(range(1, 9)), Merge.FREQUENCY)
    exact = exact_sums(rows, clusters, weights)
    error = (merge_rows(rows, clusters, weights).double() - exact).abs()
    # Half a step from the one rounding; the rest is what eight additions in float32 may add.
    float32 = 8 * torch.finfo(torch.float32).eps * exact_sums(rows.abs(), clusters, weights)
    bound = spacing(exact, dtype) / 2 + float32
    assert (error <= bound).all()

    naive = torch.zeros(1, 4096, dtype=dtype)
    for row, weight in zip(rows, weights, strict=True):
        naive += row * weight
    naive_error = (naive.double() - exact).abs()
    assert (naive_error > bound).float().mean() > 0.2
    assert naive_error.mean() > 1.5 * error.mean()


@pytest.mark.parametrize("dtype", NARROW)
def test_a_rounded_sum_is_almost_always_the_nearest_number(dtype: torch.dtype) -> None:
    clusters = Clusters.of([0, 0, 0])
    rows = random_rows(3, 20_000, dtype=dtype, seed=2)
    weights = (0.2, 0.3, 0.5)
    nearest = exact_sums(rows, clusters, weights).to(dtype)
    assert (merge_rows(rows, clusters, weights) == nearest).float().mean() > 0.995


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_experts_are_summed_in_their_own_precision(dtype: torch.dtype) -> None:
    clusters = Clusters.of([0] * 16)
    rows = random_rows(16, 1000, dtype=dtype, seed=3)
    weights = member_weights(clusters, [1] * 16, Merge.AVERAGE)
    error = (merge_rows(rows, clusters, weights).double() - exact_sums(rows, clusters, weights)).abs().max()
    assert error < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", NARROW)
def test_values_near_the_largest_number_do_not_overflow(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    rows = torch.full((4, 3), largest, dtype=dtype)
    assert (merge_rows(rows, Clusters.of([0, 0, 0, 0]), (0.25,) * 4) == largest).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_merging_equal_experts_gives_their_bits(dtype: torch.dtype) -> None:
    for seed in range(10):
        row = random_rows(1, 999, dtype=dtype, seed=seed)
        usage = torch.randint(1, 1000, (7,), generator=generator(seed)).tolist()
        clusters = Clusters.of([0, 1, 0, 1, 1, 0, 0])
        merged = merge_rows(row.expand(7, -1), clusters, member_weights(clusters, usage, Merge.FREQUENCY))
        assert torch.equal(merged.view(torch.int16), row.expand(2, -1).contiguous().view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merging_equal_experts_gives_them_up_to_the_last_bits(dtype: torch.dtype) -> None:
    row = random_rows(1, 999, dtype=dtype, seed=4)
    merged = merge_rows(row.expand(3, -1), Clusters.of([0, 0, 0]), (0.1, 0.2, 0.7))
    assert torch.allclose(merged, row, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_cluster_led_by_one_used_expert_is_that_expert(dtype: torch.dtype) -> None:
    rows = random_rows(3, 500, dtype=dtype, seed=5)
    merged = merge_rows(rows, Clusters.of([0, 0, 0]), (0.0, 1.0, 0.0))
    assert torch.equal(merged[0], rows[1])


# Experts that are alone


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_expert_that_is_alone_keeps_its_bits(dtype: torch.dtype) -> None:
    rows = random_bits(5, 3000, dtype=dtype, seed=6)
    clusters = Clusters.of([0, 1, 2, 1, 3])
    # The shares of the lonely are not even looked at.
    merged = merge_rows(rows, clusters, (0.3, 0.5, 0.3, 0.5, 0.3))
    for number, expert in ((0, 0), (2, 2), (3, 4)):
        assert torch.equal(merged[number].view(BITS[dtype]), rows[expert].view(BITS[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_many_clusters_as_experts_keeps_every_bit(dtype: torch.dtype) -> None:
    rows = random_bits(4, 6, 50, dtype=dtype, seed=7)
    merged = merge_rows(rows, Clusters.of(range(4)), (1.0,) * 4)
    assert torch.equal(merged.view(BITS[dtype]), rows.view(BITS[dtype]))


def test_merged_experts_share_no_memory_with_the_source() -> None:
    rows = torch.ones(2, 4)
    merge_rows(rows, Clusters.of([0, 1]), (1.0, 1.0)).zero_()
    assert rows.sum() == 8


def test_the_source_is_not_changed() -> None:
    rows = random_rows(4, 100, dtype=torch.float32, seed=8)
    before = rows.clone()
    merge_rows(rows, Clusters.of([0, 0, 1, 0]), (0.2, 0.3, 1.0, 0.5))
    assert torch.equal(rows, before)


# Shapes and blocks


def test_one_number_per_expert_is_merged_like_a_matrix() -> None:
    merged = merge_rows(torch.tensor([1.0, 2.0, 4.0]), Clusters.of([0, 1, 0]), (0.5, 1.0, 0.5))
    assert merged.tolist() == [2.5, 2.0]


def test_experts_that_do_not_lie_in_one_piece_are_merged_all_the_same() -> None:
    rows = random_rows(3, 40, 5, dtype=torch.float32, seed=9).movedim(2, 0)
    clusters, weights = Clusters.of([0, 1, 0, 1, 0]), (0.5, 0.4, 0.25, 0.6, 0.25)
    assert not rows.is_contiguous()
    merged = merge_rows(rows, clusters, weights)
    assert merged.is_contiguous()
    assert torch.equal(merged, merge_rows(rows.contiguous(), clusters, weights))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 64, 65, 127, 128, 129, 1000])
def test_a_sum_in_blocks_has_the_bits_of_a_sum_in_one_piece(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int
) -> None:
    rows = random_rows(6, size, dtype=dtype, seed=size)
    clusters = Clusters.of([0, 1, 0, 0, 2, 1])
    weights = member_weights(clusters, [3, 1, 4, 1, 5, 9], Merge.FREQUENCY)
    whole = merge_rows(rows, clusters, weights)
    monkeypatch.setattr(weighted, "BLOCK", 64)
    assert torch.equal(merge_rows(rows, clusters, weights), whole)


@pytest.mark.parametrize("size", [weighted.BLOCK - 1, weighted.BLOCK, weighted.BLOCK + 1, 2 * weighted.BLOCK + 3])
def test_no_entry_is_lost_at_the_edge_of_a_block(size: int) -> None:
    rows = torch.arange(2 * size, dtype=torch.float64).view(2, size)
    merged = merge_rows(rows, Clusters.of([0, 0]), (0.5, 0.5))
    assert torch.equal(merged[0], torch.arange(size, dtype=torch.float64) + size / 2)
