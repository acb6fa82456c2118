"""The subset of experts with the least loss: all are tried where there are few, otherwise greedily with exchanges."""

from collections.abc import Iterator
from itertools import combinations, islice
from math import comb

import numpy as np
from numpy.typing import NDArray

from hcsmoe_hub.methods.pruning.gram import Indices, SubsetLoss
from hcsmoe_hub.methods.pruning.subsets import Subset

# If there are more subsets, not all of them are tried.
MOST_EXACT = 50_000
# Subsets that are tried at once.
BATCH = 4096
# An exchange must lower the loss by this share of it, so that rounding cannot make two of them alternate forever.
LEAST_GAIN = 1e-12


def least_loss(loss: SubsetLoss, count: int, protected: frozenset[int] = frozenset()) -> Subset:
    """The K experts whose loss is least.

    Args:
        loss: What keeping some experts loses.
        count: K.
        protected: Experts that are kept in any case.

    Returns:
        Ascending expert numbers: the first best of all subsets while there are at most ``MOST_EXACT``, otherwise what
        ``greedy_subset`` finds.
    """
    if comb(loss.experts - len(protected), count - len(protected)) <= MOST_EXACT:
        return exact_subset(loss, count, protected)
    return greedy_subset(loss, count, protected)


def exact_subset(loss: SubsetLoss, count: int, protected: frozenset[int] = frozenset()) -> Subset:
    """The first of the subsets with the least loss, all of which are tried. Arguments are those of ``least_loss``."""
    best, lowest = np.empty(0, dtype=np.intp), np.inf
    for kept_BK in _batches(loss.experts, count, protected):
        losses_B = loss.of(kept_BK)
        first = int(losses_B.argmin())
        if losses_B[first] < lowest:
            best, lowest = kept_BK[first], float(losses_B[first])
    return tuple(sorted(int(expert) for expert in best))


def _batches(experts: int, count: int, protected: frozenset[int]) -> Iterator[Indices]:
    fixed = tuple(sorted(protected))
    others = [expert for expert in range(experts) if expert not in protected]
    subsets = combinations(others, count - len(fixed))
    while batch := [fixed + subset for subset in islice(subsets, BATCH)]:
        yield np.array(batch, dtype=np.intp)


def greedy_subset(loss: SubsetLoss, count: int, protected: frozenset[int] = frozenset()) -> Subset:
    """The better of two greedy subsets: one that grows from nothing, one that shrinks from everything.

    Each is then improved by the best exchange of a kept expert for a dropped one until none lowers the loss. Arguments
    are those of ``least_loss``.
    """
    fixed_E = np.zeros(loss.experts, dtype=np.bool_)
    fixed_E[list(protected)] = True
    starts = (_shrunk(loss, count, fixed_E), _grown(loss, count, fixed_E))
    found = [np.flatnonzero(_exchanged(loss, kept_E, fixed_E)) for kept_E in starts]
    losses = loss.of(np.array(found))
    return tuple(int(expert) for expert in found[int(losses.argmin())])


def _shrunk(loss: SubsetLoss, count: int, fixed_E: NDArray[np.bool_]) -> NDArray[np.bool_]:
    kept_E = np.ones(loss.experts, dtype=np.bool_)
    for _ in range(loss.experts - count):
        kept_E[np.where(fixed_E, np.inf, loss.without(kept_E)).argmin()] = False
    return kept_E


def _grown(loss: SubsetLoss, count: int, fixed_E: NDArray[np.bool_]) -> NDArray[np.bool_]:
    kept_E = fixed_E.copy()
    for _ in range(count - int(fixed_E.sum())):
        kept_E[loss.with_one(kept_E).argmin()] = True
    return kept_E


def _exchanged(loss: SubsetLoss, kept_E: NDArray[np.bool_], fixed_E: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Exchanges one expert after another while that helps."""
    kept_E = kept_E.copy()
    current = float(loss.of(np.flatnonzero(kept_E)[None])[0])
    while True:
        losses_EE = np.where(fixed_E[:, None], np.inf, loss.exchanged(kept_E))
        out, into = np.unravel_index(int(losses_EE.argmin()), losses_EE.shape)
        if not losses_EE[out, into] < current - LEAST_GAIN * abs(current):
            return kept_E
        kept_E[out], kept_E[into] = False, True
        # Computed anew: closed forms of many exchanges would add up their rounding.
        found = float(loss.of(np.flatnonzero(kept_E)[None])[0])
        if not found < current:
            kept_E[out], kept_E[into] = True, False
            return kept_E
        current = found
