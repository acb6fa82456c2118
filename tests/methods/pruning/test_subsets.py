"""Pruning by the error it leaves: the best of all subsets, or of as many random ones as can be tried."""

from itertools import combinations
from math import comb

import numpy as np
import pytest

from hcsmoe_hub.methods.pruning import best_subset
from hcsmoe_hub.methods.pruning.subsets import MOST_SUBSETS, Subset


def tried(experts: int, count: int, seed: int = 0) -> list[Subset]:
    """The subsets whose error is asked for, in order."""
    subsets: list[Subset] = []

    def error(subset: Subset) -> float:
        subsets.append(subset)
        return 0.0

    best_subset(error, experts, count, seed=seed)
    return subsets


@pytest.mark.parametrize(("experts", "count"), [(6, 3), (8, 1), (8, 7), (5, 5), (12, 4)])
def test_the_best_of_all_subsets_is_found(experts: int, count: int) -> None:
    # Pairs of experts matter, so that no ranking of single ones would do.
    costs_EE = np.random.default_rng(experts).normal(size=(experts, experts))

    def error(subset: Subset) -> float:
        return float(costs_EE[np.ix_(subset, subset)].sum())

    every = {subset: error(subset) for subset in combinations(range(experts), count)}
    assert best_subset(error, experts, count, seed=0) == min(every, key=lambda subset: every[subset])


def test_every_subset_is_tried_once_in_order_while_there_are_few() -> None:
    assert comb(12, 4) < MOST_SUBSETS < comb(14, 4)
    assert tried(12, 4) == list(combinations(range(12), 4))


def test_the_first_of_equals_is_taken() -> None:
    assert best_subset(lambda subset: float(0 not in subset), 5, 2, seed=0) == (0, 1)


def test_of_many_subsets_as_many_different_ones_are_tried() -> None:
    subsets = tried(14, 4)
    assert len(subsets) == len(set(subsets)) == MOST_SUBSETS
    assert all(subset == tuple(sorted(set(subset))) and len(subset) == 4 for subset in subsets)
    assert {expert for subset in subsets for expert in subset} == set(range(14))
    assert all(type(expert) is int for expert in subsets[0])


def test_the_seed_decides_which_subsets_are_tried() -> None:
    assert tried(14, 4, seed=1) == tried(14, 4, seed=1)
    assert tried(14, 4, seed=1) != tried(14, 4, seed=2)


def test_one_subset_more_than_can_be_tried_leaves_one_out() -> None:
    # 1001 subsets: the random ones must not look for the last new one forever.
    assert comb(14, 4) == MOST_SUBSETS + 1
    assert len(tried(14, 10)) == MOST_SUBSETS


def test_the_best_of_the_random_subsets_is_taken() -> None:
    weights = np.random.default_rng(3).normal(size=40)

    def error(subset: Subset) -> float:
        return float(weights[list(subset)].sum())

    found = best_subset(error, 40, 20, seed=5)
    assert found == min(tried(40, 20, seed=5), key=error)
