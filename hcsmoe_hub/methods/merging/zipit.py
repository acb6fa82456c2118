"""ZipIt: the most alike neurons of all members join, pair by pair, until as many remain as one expert has.

N neurons of all members together.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# What two merged neurons have in common with a third, as a fraction of the lesser of their correlations with it.
REPEAT_FACTOR = np.float32(0.1)


def zipit_groups(matrix_NN: Tensor, keep: int) -> Tensor:
    """Groups neurons greedily by correlation.

    Again and again the pair of the highest correlation becomes one neuron, in the place of the first of the two; its
    correlation with every other one is 0.1 times the lesser of the two that the pair had (HC-SMoE, appendix B.2, after
    ZipIt!, with alpha = 0.1). A merged neuron is the mean of all neurons in it. Neurons keep their order; among equally
    correlated pairs the one with the lowest first, then the lowest second neuron is taken.

    Every row remembers its best partner. Where that partner has changed, the row keeps its value as an upper bound and
    is searched again only when no other row has more to offer, so that a step looks at a few rows instead of all.

    Args:
        matrix_NN: ``[N, N]`` float32, exactly symmetric; overwritten where its memory can be used.
        keep: Neurons that remain, at least 1.

    Returns:
        ``[N]`` int64: group of every neuron, 0 to ``keep - 1``, on the host.
    """
    pairs = _Pairs(matrix_NN.cpu().numpy())
    joined = np.arange(len(matrix_NN))
    for _ in range(len(matrix_NN) - keep):
        first, second = pairs.best()
        pairs.join(first, second)
        joined[second] = first
    # A neuron only ever joins an earlier one, so one pass in order finds where each ended.
    for neuron in range(len(joined)):
        joined[neuron] = joined[joined[neuron]]
    _, group = np.unique(joined, return_inverse=True)
    return torch.from_numpy(group)


class _Pairs:
    """Correlations of all neurons that are left, and the best pair among them.

    Args:
        matrix: ``[N, N]``, symmetric; overwritten.
    """

    def __init__(self, matrix: NDArray[np.float32]) -> None:
        np.fill_diagonal(matrix, -np.inf)
        self._matrix = matrix
        self._alive = np.ones(len(matrix), dtype=bool)
        # Highest correlation of every row and the first neuron that has it; an upper bound alone where not exact.
        self._partner = matrix.argmax(1)
        self._value = np.take_along_axis(matrix, self._partner[:, None], 1)[:, 0]
        self._is_exact = self._alive.copy()

    def best(self) -> tuple[int, int]:
        """The pair of the highest correlation, first of the two first; the lowest numbers among equals."""
        while not self._is_exact[row := int(self._value.argmax())]:
            values = np.where(self._alive, self._matrix[row], -np.inf)
            self._partner[row] = values.argmax()
            self._value[row] = values[self._partner[row]]
            self._is_exact[row] = True
        return row, int(self._partner[row])

    def join(self, first: int, second: int) -> None:
        """Merges two neurons into the first of them."""
        self._alive[second] = False
        self._value[second] = -np.inf
        alive = np.flatnonzero(self._alive)
        values = REPEAT_FACTOR * np.minimum(self._matrix[first, alive], self._matrix[second, alive])
        self._matrix[first, alive] = values
        self._matrix[alive, first] = values
        partners, bounds = self._partner[alive], self._value[alive]
        is_lost = (partners == first) | (partners == second)
        # What is before a lost partner was worse than it, so an equal value in the first's place is the first best.
        is_tied = (values == bounds) & self._is_exact[alive] & (is_lost | (first < partners))
        is_best = (values > bounds) | is_tied
        self._is_exact[alive[is_lost & ~is_best]] = False
        winners = alive[is_best]
        self._value[winners], self._partner[winners], self._is_exact[winners] = values[is_best], first, True
        position = values.argmax()
        self._value[first], self._partner[first], self._is_exact[first] = values[position], alive[position], True
