"""Grouping around seeds: everyone joins the nearest, in one step."""

import numpy as np
import pytest
from numpy.typing import NDArray

from hcsmoe_hub.methods.clustering import single_shot


def line(*places: float) -> NDArray[np.float64]:
    return np.abs(np.subtract.outer(places, places))


def test_every_expert_joins_the_nearest_seed() -> None:
    assert single_shot(line(0, 9, 1, 8, 3), [0, 1]).tolist() == [0, 1, 0, 1, 0]


def test_labels_follow_the_order_of_the_seeds() -> None:
    assert single_shot(line(0, 9, 1, 8, 3), [1, 0]).tolist() == [1, 0, 1, 0, 1]


@pytest.mark.parametrize("seeds", [[1, 3], [3, 1]])
def test_of_equally_near_seeds_the_lowest_number_wins(seeds: list[int]) -> None:
    labels = single_shot(line(5, 4, 0, 6), seeds)
    assert seeds[labels[0]] == 1


def test_seeds_stay_in_their_own_cluster_even_if_they_are_equal() -> None:
    assert single_shot(np.zeros((5, 5)), [3, 1, 4]).tolist() == [1, 1, 1, 0, 2]


def test_everyone_a_seed_leaves_everyone_alone() -> None:
    assert single_shot(line(3, 1, 4), [0, 1, 2]).tolist() == [0, 1, 2]


def test_experts_that_are_joined_attract_nobody() -> None:
    # 2 is near 1, which joins 0; but the seed 3 is nearer to 2 than the seed 0 is.
    assert single_shot(line(0, 2, 4, 7), [0, 3]).tolist() == [0, 0, 1, 1]
