"""How well separated clusters are, from the distances between experts alone."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def silhouette(distances_EE: NDArray[np.float64], labels: Sequence[int]) -> float | None:
    """Mean silhouette of all experts (Rousseeuw 1987).

    ``s_i = (b_i - a_i) / max(a_i, b_i)``, where ``a_i`` is the mean distance to the other members of its own cluster
    and ``b_i`` the least mean distance to the members of another cluster. An expert that is alone counts 0, and so
    does one for which both are 0.

    Args:
        distances_EE: Symmetric ``[E, E]`` distances with a zero diagonal.
        labels: Cluster of every expert.

    Returns:
        Between -1 and 1, higher is better; ``None`` for a single cluster, or if every expert is alone.
    """
    _, label_E, size_C = np.unique(labels, return_inverse=True, return_counts=True)
    experts, clusters = len(label_E), len(size_C)
    if not 2 <= clusters < experts:
        return None
    every_E = np.arange(experts)
    sums_EC = distances_EE @ np.eye(clusters)[label_E]
    own_E = sums_EC[every_E, label_E] / np.maximum(size_C[label_E] - 1, 1)
    means_EC = sums_EC / size_C
    means_EC[every_E, label_E] = np.inf
    nearest_E = means_EC.min(axis=1)
    larger_E = np.maximum(own_E, nearest_E)
    counted_E = (size_C[label_E] > 1) & (larger_E > 0)
    values_E = np.divide(nearest_E - own_E, larger_E, out=np.zeros(experts), where=counted_E)
    return float(values_E.mean())


def dunn(distances_EE: NDArray[np.float64], labels: Sequence[int]) -> float | None:
    """Dunn index: the smallest distance between experts of two clusters over the largest within one (Dunn 1974).

    Args:
        distances_EE: Symmetric ``[E, E]`` distances with a zero diagonal.
        labels: Cluster of every expert.

    Returns:
        0 or more, higher is better; ``None`` for a single cluster, or if no cluster is wider than 0.
    """
    label_E = np.asarray(labels)
    together_EE = label_E[:, None] == label_E[None]
    diameter = float(distances_EE[together_EE].max())
    if together_EE.all() or diameter == 0:
        return None
    return float(distances_EE[~together_EE].min()) / diameter
