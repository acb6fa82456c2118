"""A random partition, the baseline of every grouping."""

import numpy as np
from numpy.typing import NDArray


def random_groups(experts: int, clusters: int, seed: int) -> NDArray[np.int64]:
    """Draws a partition into exactly K clusters.

    The first K experts of a random permutation start the clusters, so that none is empty; each other expert joins one
    of them, all equally likely.

    Args:
        experts: E.
        clusters: K, between 1 and E.
        seed: Seed of the draw.

    Returns:
        Labels ``[E]`` int64 between 0 and K - 1.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(experts)
    labels = np.empty(experts, dtype=np.int64)
    labels[order[:clusters]] = np.arange(clusters)
    labels[order[clusters:]] = generator.integers(clusters, size=experts - clusters)
    return labels
