"""Grouping around seeds that were chosen beforehand."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def single_shot(distances_EE: NDArray[np.float64], seeds: Sequence[int]) -> NDArray[np.int64]:
    """Every expert joins the nearest seed, in one step (M-SMoE, section 3.1).

    M-SMoE takes the most used experts as seeds and joins each other expert to the seed j with the highest cosine
    similarity of router logits, which is the one with the least cosine distance: ``argmin_j d(i, j)``. Seeds stay in
    their own cluster.

    Args:
        distances_EE: Symmetric ``[E, E]`` distances.
        seeds: K different experts.

    Returns:
        Labels ``[E]`` int64: the position of each expert's seed in ``seeds``. Of equally near seeds, the one with the
        lowest number.
    """
    ascending = np.sort(np.asarray(seeds, dtype=np.int64))
    joined = ascending[distances_EE[:, ascending].argmin(axis=1)]
    joined[ascending] = ascending
    position = {int(seed): number for number, seed in enumerate(seeds)}
    return np.array([position[int(seed)] for seed in joined], dtype=np.int64)
