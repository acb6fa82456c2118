"""Top-k agreement: how many of the clusters that the full router chose the reduced router chooses too."""

import pytest
import torch

from hcsmoe_hub.methods.clustering import Clusters
from hcsmoe_hub.methods.routing import top_k_agreement

# Experts 0, 2 and 5 are cluster 0; 1 and 4 are cluster 1; 3 is cluster 2.
CLUSTERS = Clusters.of([0, 1, 0, 2, 1, 0])


def agreement(full: list[list[int]], reduced: list[list[int]], dtype: torch.dtype = torch.int16) -> float:
    return top_k_agreement(torch.tensor(full, dtype=dtype), torch.tensor(reduced, dtype=dtype), CLUSTERS)


@pytest.mark.parametrize(
    ("full", "reduced", "share"),
    [
        ([[0, 1]], [[0, 1]], 1.0),
        ([[0, 1]], [[1, 0]], 1.0),
        ([[0, 1]], [[0, 2]], 0.5),
        ([[0, 3]], [[1, 1]], 0.0),
        # Both experts are in cluster 0: it is wanted once, whatever the second choice is.
        ([[0, 2]], [[0, 1]], 1.0),
        ([[0, 2]], [[1, 2]], 0.0),
        ([[0, 1]], [[0, 0]], 0.5),
        ([[0, 1, 3]], [[2, 1, 2]], 2 / 3),
    ],
)
def test_one_token_by_hand(full: list[list[int]], reduced: list[list[int]], share: float) -> None:
    assert agreement(full, reduced) == pytest.approx(share)


def test_tokens_count_equally_however_many_clusters_they_wanted() -> None:
    # 1 of 1, 1 of 2, 0 of 2: the mean of the shares is 1/2, the share of all wanted clusters would be 2/5.
    assert agreement([[0, 5], [1, 3], [0, 4]], [[0, 2], [1, 0], [2, 2]]) == pytest.approx(0.5)


def test_no_choice_of_the_full_router_is_not_wanted() -> None:
    assert agreement([[0, -1]], [[0, 1]]) == 1
    assert agreement([[3, -1]], [[0, 1]]) == 0


def test_no_choice_of_the_reduced_router_meets_nothing() -> None:
    assert agreement([[0, 3]], [[-1, 0]]) == 0.5
    # The last cluster must not be mistaken for "none", nor the other way round.
    assert agreement([[3, 3]], [[-1, -1]]) == 0


def test_tokens_that_no_expert_saw_are_left_out_of_the_mean() -> None:
    assert agreement([[-1, -1], [0, 1]], [[0, 1], [0, 2]]) == 0.5


def test_agreement_is_full_when_no_token_was_routed_at_all() -> None:
    assert agreement([[-1, -1]], [[0, 1]]) == 1


def test_the_reduced_router_may_choose_more_or_fewer_experts() -> None:
    assert agreement([[0, 1]], [[0]]) == 0.5
    assert agreement([[3]], [[0, 1, 2]]) == 1


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_any_integer_holds_the_choices(dtype: torch.dtype) -> None:
    assert agreement([[0, 1], [3, -1]], [[0, 2], [-1, 2]], dtype) == 0.75


def test_a_router_agrees_fully_with_itself_when_every_expert_is_alone() -> None:
    choices = torch.randint(0, 6, (200, 2), generator=torch.Generator().manual_seed(0))
    assert top_k_agreement(choices, choices, Clusters.of(range(6))) == 1


def test_agreement_equals_the_definition_on_random_choices() -> None:
    numbers = torch.Generator().manual_seed(1)
    for _ in range(20):
        full = torch.randint(-1, 6, (30, 3), generator=numbers)
        reduced = torch.randint(-1, 3, (30, 2), generator=numbers)
        shares = []
        for wanted_experts, chosen in zip(full.tolist(), reduced.tolist(), strict=True):
            wanted = {CLUSTERS.labels[expert] for expert in wanted_experts if expert >= 0}
            if wanted:
                shares.append(len(wanted & {cluster for cluster in chosen if cluster >= 0}) / len(wanted))
        assert top_k_agreement(full, reduced, CLUSTERS) == pytest.approx(sum(shares) / len(shares))


@pytest.mark.parametrize(
    ("full", "reduced", "share"),
    [
        ([[1, 0]], [[0, 1]], 0.5),
        # Two dropped experts are two lost choices, not one.
        ([[0, 3, 1]], [[0, 1, 1]], 1 / 3),
        ([[0, 3]], [[0, 1]], 0.0),
        ([[1, 2]], [[0, 1]], 1.0),
        ([[0, -1]], [[-1, 0]], 0.0),
        ([[-1, -1], [1, -1]], [[0, 1], [0, 1]], 1.0),
    ],
)
def test_a_dropped_expert_is_wanted_but_never_met(
    full: list[list[int]], reduced: list[list[int]], share: float
) -> None:
    clusters = Clusters.of([-1, 0, 1, -1])
    assert top_k_agreement(torch.tensor(full), torch.tensor(reduced), clusters) == pytest.approx(share)
