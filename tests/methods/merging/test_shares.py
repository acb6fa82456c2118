"""How much each member of a cluster counts: every rule, and the cases where a rule says nothing."""

from typing import Any

import numpy as np
import pytest
import torch

from hcsmoe_hub.methods.clustering import Clusters, Grouping
from hcsmoe_hub.methods.merging import member_shares
from hcsmoe_hub.methods.merging.shares import dominant_shares, membership_shares, proportional_shares
from hcsmoe_hub.options import Merge

CLUSTERS = Clusters.of([0, 1, 0, 1, 1])
MEMBERSHIP = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5], [0.1, 0.9]])
SCORES: dict[str, Any] = {
    "usage_E": [30, 1, 10, 2, 5],
    "saliency_E": [1.0, 0.5, 3.0, 0.0, 1.5],
    "dominants": (2, 1),
    "dominant_weights": (2.0, 1.0),
}
GROUPING = Grouping(clusters=CLUSTERS, membership_EC=MEMBERSHIP)
EQUAL = (Merge.AVERAGE, Merge.FIX_DOM, Merge.FIX_DOM_ONE_TO_ONE, Merge.ZIPIT)


def column(merge: Merge, cluster: int) -> list[float]:
    return member_shares(GROUPING, merge, **SCORES)[:, cluster].tolist()


def test_frequency_shares_are_shares_of_the_tokens_of_a_cluster() -> None:
    assert column(Merge.FREQUENCY, 0) == [0.75, 0, 0.25, 0, 0]
    assert column(Merge.FREQUENCY, 1) == [0, 0.125, 0, 0.25, 0.625]


def test_saliency_shares_follow_the_saliency_instead_of_the_tokens() -> None:
    assert column(Merge.SALIENCY, 0) == [0.25, 0, 0.75, 0, 0]
    assert column(Merge.SALIENCY, 1) == [0, 0.25, 0, 0, 0.75]


@pytest.mark.parametrize("merge", EQUAL)
def test_members_count_equally_in_an_average_and_where_neurons_are_merged(merge: Merge) -> None:
    shares = member_shares(GROUPING, merge)
    assert shares[:, 0].tolist() == [1 / 2, 0, 1 / 2, 0, 0]
    assert shares[:, 1].tolist() == pytest.approx([0, 1 / 3, 0, 1 / 3, 1 / 3])


def test_the_dominant_expert_has_one_weight_and_every_other_the_second() -> None:
    assert column(Merge.DOMINANT, 0) == pytest.approx([1 / 3, 0, 2 / 3, 0, 0])
    assert column(Merge.DOMINANT, 1) == pytest.approx([0, 2 / 4, 0, 1 / 4, 1 / 4])


@pytest.mark.parametrize(("weights", "expected"), [((1, 0), [0, 0, 1, 0, 0]), ((0, 1), [1, 0, 0, 0, 0])])
def test_a_dominant_weight_may_be_zero(weights: tuple[float, float], expected: list[float]) -> None:
    assert dominant_shares(CLUSTERS, (2, 1), weights)[:, 0].tolist() == expected


def test_an_expert_that_is_alone_counts_fully_even_if_its_weight_is_zero() -> None:
    assert dominant_shares(Clusters.of([0, 1, 1]), (0, 1), (0.0, 1.0))[:, 0].tolist() == [1, 0, 0]


def test_memberships_are_normalised_over_the_experts_of_a_cluster() -> None:
    shares = membership_shares(MEMBERSHIP)
    assert shares[:, 0].tolist() == pytest.approx([0.9 / 2.3, 0.2 / 2.3, 0.6 / 2.3, 0.5 / 2.3, 0.1 / 2.3])
    assert torch.allclose(shares.sum(0), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("merge", [Merge.FREQUENCY, Merge.SALIENCY])
def test_the_members_of_a_cluster_without_any_score_count_equally(merge: Merge) -> None:
    scores = [0, 3, 0, 1, 0, 0]
    shares = member_shares(Grouping(clusters=Clusters.of([0, 1, 0, 1, 0, 0])), merge, usage_E=scores, saliency_E=scores)
    assert shares[:, 0].tolist() == [0.25, 0, 0.25, 0, 0.25, 0.25]


def test_an_unused_member_of_a_used_cluster_counts_nothing() -> None:
    assert proportional_shares(Clusters.of([0, 0, 0]), [0, 6, 2])[:, 0].tolist() == [0, 0.75, 0.25]


@pytest.mark.parametrize("merge", [merge for merge in Merge if merge is not Merge.MEMBERSHIP])
def test_dropped_experts_have_no_share_in_anything(merge: Merge) -> None:
    shares = member_shares(Grouping(clusters=Clusters.of([-1, 0, -1, 1, 0])), merge, **{**SCORES, "dominants": (1, 3)})
    assert shares.shape == (5, 2)
    assert shares[[0, 2]].abs().sum() == 0
    assert torch.allclose(shares.sum(0), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("merge", [merge for merge in Merge if merge is not Merge.MEMBERSHIP])
@pytest.mark.parametrize("seed", range(10))
def test_every_column_sums_to_one_and_every_row_has_one_cluster(merge: Merge, seed: int) -> None:
    numbers = np.random.default_rng(seed)
    clusters = Clusters.of(numbers.integers(0, 5, 16).tolist())
    shares = member_shares(
        Grouping(clusters=clusters),
        merge,
        usage_E=numbers.integers(0, 3, 16).tolist(),
        saliency_E=numbers.random(16).tolist(),
        dominants=[members[0] for members in clusters.members],
        dominant_weights=(3.0, 1.0),
    )
    assert shares.dtype == torch.float64
    assert (shares.sum(0) - 1).abs().max() < 1e-12
    assert (shares >= 0).all()
    for expert, label in enumerate(clusters.labels):
        assert shares[expert, [other for other in range(shares.shape[1]) if other != label]].abs().sum() == 0


@pytest.mark.parametrize("merge", [merge for merge in Merge if merge is not Merge.MEMBERSHIP])
def test_an_expert_that_is_alone_has_a_share_of_exactly_one(merge: Merge) -> None:
    shares = member_shares(Grouping(clusters=Clusters.of([0, 1, 2, 1, 1])), merge, **{**SCORES, "dominants": (0, 1, 2)})
    assert shares[[0, 2], [0, 2]].tolist() == [1, 1]
