"""N router rows to K: every policy, every shape that a router tensor has, and tables of expert numbers."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hcsmoe_hub.methods.clustering import Clusters
from hcsmoe_hub.methods.routing import reduce_rows, remap_experts
from hcsmoe_hub.model.blocks import ExpertTensor
from hcsmoe_hub.options import RouterPolicy

CLUSTERS = Clusters.of([0, 1, 0, 2, 1, 0])
USAGE = [1, 6, 5, 0, 2, 4]
DOMINANTS = (2, 1, 3)
ROWS = torch.tensor([[0.0, 1.0], [10.0, 11.0], [20.0, 21.0], [30.0, 31.0], [40.0, 41.0], [50.0, 51.0]])


def reduce(rows: Tensor, policy: RouterPolicy, usage: list[int] = USAGE) -> Tensor:
    """Reduces with hard memberships where the policy asks for some."""
    membership = np.eye(3)[list(CLUSTERS.labels)]
    return reduce_rows(rows, CLUSTERS, policy, dominants=DOMINANTS, usage_E=usage, membership_EC=membership)


def reduce_part(tensor: Tensor, part: ExpertTensor, policy: RouterPolicy = RouterPolicy.DOMINANT) -> Tensor:
    """Reduces the experts' part of a whole router tensor, as a conversion does."""
    rows, extra = part.split(tensor)
    return part.join(reduce(rows, policy), extra)


# The policies


def test_dominant_takes_the_row_of_the_dominant_member() -> None:
    assert reduce(ROWS, RouterPolicy.DOMINANT).tolist() == [[20, 21], [10, 11], [30, 31]]


def test_frequency_takes_the_mean_of_the_rows_weighted_by_usage() -> None:
    reduced = reduce(ROWS, RouterPolicy.FREQUENCY)
    assert reduced[:, 0].tolist() == pytest.approx([(0 * 1 + 20 * 5 + 50 * 4) / 10, (10 * 6 + 40 * 2) / 8, 30])
    assert torch.allclose(reduced[:, 1], reduced[:, 0] + 1)


def test_average_takes_the_plain_mean_of_the_rows() -> None:
    reduced = reduce(ROWS, RouterPolicy.AVERAGE)
    assert reduced[:, 0].tolist() == pytest.approx([70 / 3, 25, 30])


def test_rows_of_a_cluster_that_no_token_reached_count_equally() -> None:
    unused = [0] * 6
    by_frequency = reduce(ROWS, RouterPolicy.FREQUENCY, unused)
    assert torch.equal(by_frequency, reduce(ROWS, RouterPolicy.AVERAGE, unused))


def test_membership_weighs_the_rows_of_all_experts() -> None:
    membership = np.array([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.25, 0.75], [0.75, 0.25]])
    reduced = reduce_rows(
        ROWS,
        Clusters.of([0, 0, 1, 0, 1, 0]),
        RouterPolicy.MEMBERSHIP,
        dominants=(0, 2),
        usage_E=USAGE,
        membership_EC=membership,
    )
    assert torch.allclose(reduced.double(), torch.from_numpy(membership / membership.sum(0)).T @ ROWS.double())


@pytest.mark.parametrize("policy", [policy for policy in RouterPolicy if policy is not RouterPolicy.MEMBERSHIP])
def test_rows_of_dropped_experts_go(policy: RouterPolicy) -> None:
    clusters = Clusters.of([-1, 0, 1, -1, 2, -1])
    reduced = reduce_rows(ROWS, clusters, policy, dominants=(1, 2, 4), usage_E=USAGE)
    assert torch.equal(reduced, ROWS[[1, 2, 4]])


@pytest.mark.parametrize("policy", RouterPolicy)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_as_many_clusters_as_experts_keeps_every_row_bit_for_bit(policy: RouterPolicy, dtype: torch.dtype) -> None:
    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    reduced = reduce_rows(
        rows, Clusters.of(range(6)), policy, dominants=range(6), usage_E=USAGE, membership_EC=np.eye(6)
    )
    assert reduced.dtype == dtype
    assert torch.equal(reduced, rows)


@pytest.mark.parametrize("policy", RouterPolicy)
def test_a_bias_is_reduced_exactly_like_the_rows(policy: RouterPolicy) -> None:
    bias = reduce(ROWS[:, 0], policy)
    assert bias.shape == (3,)
    assert torch.equal(bias, reduce(ROWS, policy)[:, 0])


@pytest.mark.parametrize("policy", RouterPolicy)
def test_reduced_rows_share_no_memory_with_the_source(policy: RouterPolicy) -> None:
    rows = ROWS.clone()
    reduce(rows, policy).zero_()
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
        assert torch.equal(reduced[:3], reduce(ROWS, policy))


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


def test_a_table_may_leave_out_the_dropped_experts() -> None:
    assert remap_experts(torch.tensor([[1, 2]]), Clusters.of([-1, 0, 1])).tolist() == [[0, 1]]


def test_a_table_that_names_a_dropped_expert_is_refused() -> None:
    with pytest.raises(AssertionError, match="dropped"):
        remap_experts(torch.tensor([[0, 2]]), Clusters.of([-1, 0, 1]))
