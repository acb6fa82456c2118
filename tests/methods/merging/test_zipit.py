"""ZipIt groups neurons as the plain rule does, in which every step looks at all pairs."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hcsmoe_hub.methods.merging.zipit import zipit_groups


def plain_zipit(matrix: Tensor, keep: int) -> list[int]:
    """The rule word by word: best pair of all, one row and one column less each time."""
    matrix = matrix.clone().fill_diagonal_(-torch.inf)
    groups = [[neuron] for neuron in range(len(matrix))]
    while len(groups) > keep:
        first, second = divmod(int(matrix.argmax()), len(matrix))
        values = 0.1 * torch.minimum(matrix[first], matrix[second])
        matrix[first] = values
        matrix[:, first] = values
        matrix[first, first] = -torch.inf
        groups[first] += groups.pop(second)
        rest = torch.arange(len(matrix)) != second
        matrix = matrix[rest][:, rest]
    numbers = {neuron: number for number, group in enumerate(groups) for neuron in group}
    return [numbers[neuron] for neuron in range(len(numbers))]


def symmetric(values: Tensor) -> Tensor:
    return values.triu(1) + values.triu(1).T


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("kind", ["random", "many ties", "all negative", "all equal"])
def test_groups_are_those_of_the_plain_rule(kind: str, seed: int) -> None:
    numbers = torch.Generator().manual_seed(seed)
    size = 3 + seed % 20
    keep = 1 + seed % (size - 1)
    random = torch.rand(size, size, generator=numbers) * 2 - 1
    values = {
        "random": random,
        "many ties": (random * 3).round() / 3,
        "all negative": -random.abs() - 0.01,
        "all equal": torch.zeros(size, size),
    }[kind]
    matrix = symmetric(values)
    expected = plain_zipit(matrix, keep)
    assert zipit_groups(matrix, keep).tolist() == expected


def test_three_neurons_by_hand() -> None:
    matrix = torch.tensor([[1.0, 0.2, 0.9], [0.2, 1.0, 0.3], [0.9, 0.3, 1.0]])
    assert zipit_groups(matrix, 2).tolist() == [0, 1, 0]


def test_a_merged_neuron_is_slow_to_merge_again() -> None:
    # 0 and 1 merge first; their common 0.8 with 2 becomes 0.08, so 2 and 3 with 0.1 come next.
    matrix = torch.tensor([[1, 0.9, 0.8, 0.0], [0.9, 1, 0.8, 0.0], [0.8, 0.8, 1, 0.1], [0.0, 0.0, 0.1, 1]])
    assert zipit_groups(matrix, 2).tolist() == [0, 0, 1, 1]


def test_keeping_all_neurons_merges_none() -> None:
    matrix = symmetric(torch.rand(7, 7, generator=torch.Generator().manual_seed(0)))
    assert zipit_groups(matrix, 7).tolist() == list(range(7))


def test_one_group_takes_all() -> None:
    matrix = symmetric(torch.rand(7, 7, generator=torch.Generator().manual_seed(0)))
    assert zipit_groups(matrix, 1).tolist() == [0] * 7


@pytest.mark.parametrize("seed", range(5))
def test_copies_of_neurons_find_each_other(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    features = numbers.standard_normal((200, 12))
    order = numbers.permutation(12)
    both = np.concatenate([features, features[:, order]], axis=1)
    matrix = torch.from_numpy(np.corrcoef(both.T)).float()
    groups = zipit_groups(symmetric(matrix), 12).tolist()
    assert groups[:12] == list(range(12))
    assert groups[12:] == order.tolist()
