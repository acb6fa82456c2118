"""N router rows to K: the three policies, every shape that a router tensor has, and tables of expert numbers."""

import pytest
import torch
from torch import Tensor

from hcsmoe_hub.clustering import Clusters
from hcsmoe_hub.moe.blocks import ExpertTensor
from hcsmoe_hub.options import RouterPolicy
from hcsmoe_hub.routing import reduce_rows, remap_experts

CLUSTERS = Clusters.of([0, 1, 0, 2, 1, 0])
USAGE = [1, 6, 5, 0, 2, 4]
ROWS = torch.tensor([[0.0, 1.0], [10.0, 11.0], [20.0, 21.0], [30.0, 31.0], [40.0, 41.0], [50.0, 51.0]])


def reduce_part(tensor: Tensor, part: ExpertTensor, policy: RouterPolicy = RouterPolicy.DOMINANT) -> Tensor:
    """Reduces the experts' part of a whole router tensor, as a conversion does."""
    rows, extra = part.split(tensor)
    return part.join(reduce_rows(rows, CLUSTERS, USAGE, policy), extra)


# The policies


def test_dominant_takes_the_row_of_the_most_used_member() -> None:
    assert reduce_rows(ROWS, CLUSTERS, USAGE, RouterPolicy.DOMINANT).tolist() == [[20, 21], [10, 11], [30, 31]]


def test_frequency_takes_the_mean_of_the_rows_weighted_by_usage() -> None:
    reduced = reduce_rows(ROWS, CLUSTERS, USAGE, RouterPolicy.FREQUENCY)
    assert reduced[:, 0].tolist() == pytest.approx([(0 * 1 + 20 * 5 + 50 * 4) / 10, (10 * 6 + 40 * 2) / 8, 30])
    assert torch.allclose(reduced[:, 1], reduced[:, 0] + 1)


def test_average_takes_the_plain_mean_of_the_rows() -> None:
    reduced = reduce_rows(ROWS, CLUSTERS, USAGE, RouterPolicy.AVERAGE)
    assert reduced[:, 0].tolist() == pytest.approx([70 / 3, 25, 30])


def test_the_lowest_expert_gives_the_row_among_equally_used_ones() -> None:
    reduced = reduce_rows(ROWS, CLUSTERS, [3, 2, 3, 0, 2, 3], RouterPolicy.DOMINANT)
    assert reduced.tolist() == [[0, 1], [10, 11], [30, 31]]


def test_rows_of_a_cluster_that_no_token_reached_count_equally() -> None:
    unused = [0] * 6
    by_frequency = reduce_rows(ROWS, CLUSTERS, unused, RouterPolicy.FREQUENCY)
    assert torch.equal(by_frequency, reduce_rows(ROWS, CLUSTERS, unused, RouterPolicy.AVERAGE))


@pytest.mark.parametrize("policy", RouterPolicy)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_as_many_clusters_as_experts_keeps_every_row_bit_for_bit(policy: RouterPolicy, dtype: torch.dtype) -> None:
    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    reduced = reduce_rows(rows, Clusters.of(range(6)), USAGE, policy)
    assert reduced.dtype == dtype
    assert torch.equal(reduced, rows)


@pytest.mark.parametrize("policy", RouterPolicy)
def test_a_bias_is_reduced_exactly_like_the_rows(policy: RouterPolicy) -> None:
    bias = reduce_rows(ROWS[:, 0], CLUSTERS, USAGE, policy)
    assert bias.shape == (3,)
    assert torch.equal(bias, reduce_rows(ROWS, CLUSTERS, USAGE, policy)[:, 0])


@pytest.mark.parametrize("policy", RouterPolicy)
def test_reduced_rows_share_no_memory_with_the_source(policy: RouterPolicy) -> None:
    rows = ROWS.clone()
    reduce_rows(rows, CLUSTERS, USAGE, policy).zero_()
    assert torch.equal(rows, ROWS)


# The shapes


@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ((6,), {"dim": 0, "rows_per_expert": 1, "extra_rows": 0}),
        ((6, 5), {"dim": 0, "rows_per_expert": 1, "extra_rows": 0}),
        ((1, 6), {"dim": 1, "rows_per_expert": 1, "extra_rows": 0}),
        ((6, 5, 4), {"dim": 0, "rows_per_expert": 1, "extra_rows": 0}),
        ((5, 6), {"dim": 1, "rows_per_expert": 1, "extra_rows": 0}),
        ((8, 5), {"dim": 0, "rows_per_expert": 1, "extra_rows": 2}),
        ((7,), {"dim": 0, "rows_per_expert": 1, "extra_rows": 1}),
        ((5, 9), {"dim": 1, "rows_per_expert": 1, "extra_rows": 3}),
        ((24, 5), {"dim": 0, "rows_per_expert": 4, "extra_rows": 0}),
        ((26, 5), {"dim": 0, "rows_per_expert": 4, "extra_rows": 2}),
        ((5, 13), {"dim": 1, "rows_per_expert": 2, "extra_rows": 1}),
        ((2, 18, 3), {"dim": 1, "rows_per_expert": 3, "extra_rows": 0}),
    ],
)
def test_splitting_and_joining_gives_the_same_tensor(shape: tuple[int, ...], part: dict[str, int]) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    described = ExpertTensor(name="router", **part)
    experts, extra = described.split(tensor)
    assert experts.shape[0] == 6
    assert extra.shape[0] == part["extra_rows"]
    joined = described.join(experts, extra)
    assert torch.equal(joined, tensor)
    assert joined.is_contiguous()


def test_rows_beyond_the_experts_stay_as_they_are() -> None:
    skip_class = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    part = ExpertTensor(name="router.weight", dim=0, rows_per_expert=1, extra_rows=2)
    for policy in RouterPolicy:
        reduced = reduce_part(torch.cat([ROWS, skip_class]), part, policy)
        assert reduced.shape == (5, 2)
        assert torch.equal(reduced[3:], skip_class)
        assert torch.equal(reduced[:3], reduce_rows(ROWS, CLUSTERS, USAGE, policy))


def test_a_bias_with_an_entry_beyond_the_experts_keeps_it() -> None:
    part = ExpertTensor(name="router.bias", dim=0, rows_per_expert=1, extra_rows=1)
    bias = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 99.0])
    assert reduce_part(bias, part).tolist() == [2, 1, 3, 99]


def test_a_correction_bias_of_one_row_is_reduced_along_its_columns() -> None:
    part = ExpertTensor(name="e_score_correction_bias", dim=1, rows_per_expert=1, extra_rows=0)
    assert reduce_part(torch.arange(6.0)[None], part).tolist() == [[2, 1, 3]]


def test_experts_in_columns_with_extra_columns_are_reduced_along_them() -> None:
    part = ExpertTensor(name="router.weight", dim=1, rows_per_expert=1, extra_rows=1)
    tensor = torch.cat([ROWS.T, torch.tensor([[7.0], [8.0]])], dim=1)
    reduced = reduce_part(tensor, part)
    assert reduced.tolist() == [[20, 10, 30, 7], [21, 11, 31, 8]]
    assert reduced.is_contiguous()


def test_several_rows_per_expert_move_together() -> None:
    part = ExpertTensor(name="experts.w1", dim=0, rows_per_expert=3, extra_rows=0)
    tensor = torch.arange(36.0).view(18, 2)
    expected = torch.cat([tensor[6:9], tensor[3:6], tensor[9:12]])
    assert torch.equal(reduce_part(tensor, part), expected)


# Tables of expert numbers


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_a_table_of_experts_becomes_a_table_of_their_clusters(dtype: torch.dtype) -> None:
    table = torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=dtype)
    remapped = remap_experts(table, CLUSTERS)
    assert remapped.dtype == dtype
    assert remapped.tolist() == [[0, 1], [0, 2], [1, 0]]


@pytest.mark.parametrize("shape", [(12,), (3, 4), (2, 3, 2)])
def test_a_table_keeps_its_shape(shape: tuple[int, ...]) -> None:
    table = torch.randint(0, 6, shape, generator=torch.Generator().manual_seed(0))
    remapped = remap_experts(table, CLUSTERS)
    assert remapped.shape == shape
    assert remapped.flatten().tolist() == [CLUSTERS.labels[expert] for expert in table.flatten().tolist()]


def test_a_table_stays_as_it_is_when_every_expert_is_alone() -> None:
    table = torch.randint(0, 6, (50, 2), generator=torch.Generator().manual_seed(1))
    assert torch.equal(remap_experts(table, Clusters.of(range(6))), table)
