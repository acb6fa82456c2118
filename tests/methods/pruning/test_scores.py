"""Pruning by a score: the best stay, equals go by number, protected ones stay whatever their score."""

import pytest

from hcsmoe_hub.methods.pruning import keep_best, keep_only


def kept(labels: tuple[int, ...]) -> list[int]:
    """Experts that are not dropped."""
    return [expert for expert, label in enumerate(labels) if label != -1]


def test_the_highest_scores_stay() -> None:
    clusters = keep_best([3, 9, 1, 7, 5], 3)
    assert clusters.labels == (-1, 0, -1, 1, 2)
    assert clusters.members == ((1,), (3,), (4,))
    assert clusters.heights == ()


def test_the_lowest_number_stays_among_equals() -> None:
    assert kept(keep_best([2.0, 1.0, 2.0, 2.0, 1.0], 2).labels) == [0, 2]
    assert kept(keep_best([2.0, 1.0, 2.0, 2.0, 1.0], 4).labels) == [0, 1, 2, 3]
    assert kept(keep_best([0.0] * 5, 2).labels) == [0, 1]


def test_protected_experts_stay_whatever_their_score() -> None:
    assert kept(keep_best([3, 9, 1, 7, 5], 3, frozenset({2})).labels) == [1, 2, 3]
    assert kept(keep_best([3, 9, 1, 7, 5], 2, frozenset({0, 2})).labels) == [0, 2]


def test_protection_of_an_expert_that_stays_anyway_changes_nothing() -> None:
    assert keep_best([3, 9, 1, 7, 5], 3, frozenset({1})) == keep_best([3, 9, 1, 7, 5], 3)


@pytest.mark.parametrize("protected", [frozenset[int](), frozenset({4})])
def test_as_many_as_there_are_drop_nobody(protected: frozenset[int]) -> None:
    assert keep_best([3, 9, 1, 7, 5], 5, protected).labels == (0, 1, 2, 3, 4)


def test_kept_experts_are_numbered_in_their_order() -> None:
    assert keep_only((4, 0, 2), 6).labels == (0, -1, 1, -1, 2, -1)
