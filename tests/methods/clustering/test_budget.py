"""Clusters per layer by frequency: the exact total, floors, and equal frequencies."""

import numpy as np
import pytest

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.methods.clustering import frequency_budget


def test_layers_get_as_many_clusters_as_they_have_of_the_most_frequent_experts() -> None:
    # Frequencies: .7 .1 .1 .1 and .3 .3 .2 .2; the four highest are .7 .3 .3 and .2.
    assert frequency_budget([[7, 1, 1, 1], [3, 3, 2, 2]], 2, 1) == (1, 3)


def test_frequencies_are_those_inside_the_layer() -> None:
    usage = [[70, 10, 10, 10], [3, 3, 2, 2]]
    assert frequency_budget(usage, 2, 1) == frequency_budget([[7, 1, 1, 1], [3, 3, 2, 2]], 2, 1)


def test_every_layer_keeps_its_floor() -> None:
    # By frequency alone, the second layer has none of the four highest.
    usage = [[25, 25, 25, 25, 0, 0, 0, 0], [13, 13, 13, 13, 12, 12, 12, 12]]
    assert frequency_budget(usage, 2, 0) == (4, 0)
    assert frequency_budget(usage, 2, 1) == (3, 1)
    assert frequency_budget(usage, 2, 2) == (2, 2)
    assert frequency_budget(usage, 3, [1, 4]) == (2, 4)


def test_no_layer_gets_more_clusters_than_it_has_experts() -> None:
    assert frequency_budget([[1, 1], [1] * 6], 3, 1) == (2, 4)


def test_equal_frequencies_are_taken_from_the_lower_layer_first() -> None:
    assert frequency_budget([[1] * 4, [2] * 4, [3] * 4], 2, 1) == (4, 1, 1)


def test_equal_frequencies_from_different_numbers_of_tokens_are_equal() -> None:
    # Every expert has a third of the tokens of its layer.
    assert frequency_budget([[7] * 3, [10**9] * 3, [1] * 3], 1, 0) == (3, 0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_the_total_is_always_exact_although_frequencies_are_tied(seed: int) -> None:
    generator = np.random.default_rng(seed)
    usage = generator.integers(0, 4, (5, 8)).tolist()
    for average in range(1, 9):
        for floor in range(average + 1):
            found = frequency_budget(usage, average, floor)
            assert sum(found) == 5 * average
            assert all(floor <= count <= 8 for count in found)


def test_a_floor_of_one_is_the_rule_that_sets_the_highest_frequency_of_every_layer_to_one() -> None:
    for seed in range(20):
        usage = np.random.default_rng(seed).integers(1, 10**6, (6, 16)) ** 2
        frequency = usage / usage.sum(axis=1, keepdims=True)
        frequency[np.arange(6), frequency.argmax(axis=1)] = 1.0
        threshold = np.sort(frequency, axis=None)[-24]
        assert frequency_budget(usage.tolist(), 4, 1) == tuple((frequency >= threshold).sum(axis=1).tolist())


def test_a_layer_without_any_tokens_keeps_its_floor() -> None:
    assert frequency_budget([[0, 0, 0], [5, 4, 3]], 2, 1) == (1, 3)


def test_floors_above_the_total_are_refused_with_the_numbers() -> None:
    with pytest.raises(PlanError, match=r"keep 4, but they must keep 5 to 8"):
        frequency_budget([[1] * 4, [1] * 4], 2, [1, 4])


def test_more_experts_than_there_are_cannot_be_kept() -> None:
    with pytest.raises(PlanError, match=r"keep 10, but they must keep 2 to 8"):
        frequency_budget([[1] * 4, [1] * 4], 5, 1)


def test_a_floor_above_the_experts_of_a_layer_is_refused() -> None:
    with pytest.raises(PlanError, match="number 1 must keep at least 3 experts, but it has 2"):
        frequency_budget([[1] * 4, [1] * 2], 2, 3)
