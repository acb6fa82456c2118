"""Pruning by the error that it causes: the subset of experts whose layer output is nearest to the full layer's."""

from collections.abc import Callable, Iterator
from itertools import combinations
from math import comb

import numpy as np

# If there are more subsets, that many are drawn at random.
MOST_SUBSETS = 1000

Subset = tuple[int, ...]


def best_subset(error: Callable[[Subset], float], experts: int, count: int, *, seed: int) -> Subset:
    """The subset of K experts with the smallest reconstruction error (NAEE, Lu et al. 2024).

    ``argmin_{|S| = K} ||F(x; S) - F(x)||`` over calibration tokens, F the output of the layer when its router may
    choose from S only. All ``C(N, K)`` subsets are tried while there are at most ``MOST_SUBSETS``; beyond that as
    many distinct random ones, which the papers call O-prune on models of many experts.

    Args:
        error: Reconstruction error of a subset, ascending expert numbers.
        experts: N.
        count: K.
        seed: Of the random subsets.

    Returns:
        The best subset; the first one among equals.
    """
    exhaustive = comb(experts, count) <= MOST_SUBSETS
    subsets = combinations(range(experts), count) if exhaustive else _random_subsets(experts, count, seed)
    return min(subsets, key=error)


def _random_subsets(experts: int, count: int, seed: int) -> Iterator[Subset]:
    generator, seen = np.random.default_rng(seed), set[Subset]()
    while len(seen) < MOST_SUBSETS:
        subset = tuple(sorted(int(expert) for expert in generator.choice(experts, count, replace=False)))
        if subset not in seen:
            seen.add(subset)
            yield subset
