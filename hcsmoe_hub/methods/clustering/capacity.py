"""Clusters of a limited size."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from hcsmoe_hub.errors import PlanError

# Differences below this part of the largest value are rounding, not an order.
TIE = 1e-9


def lowest_of_least(values: NDArray[np.float64]) -> int:
    """Position of the least value, the lowest among those that are equal up to rounding."""
    return int(np.flatnonzero(values <= values.min() + TIE * np.abs(values).max())[0])


def medoids(distances_EE: NDArray[np.float64], labels: NDArray[np.int64]) -> tuple[int, ...]:
    """The member of every cluster with the least sum of distances to the others, the lowest number among equals.

    Args:
        distances_EE: Symmetric ``[E, E]`` distances with a zero diagonal.
        labels: Cluster of every expert ``[E]``, numbered from 0 without gaps.

    Returns:
        One expert per cluster.
    """
    found = []
    for label in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels == label)
        found.append(int(members[lowest_of_least(distances_EE[np.ix_(members, members)].sum(axis=1))]))
    return tuple(found)


def limit_sizes(
    distances_EE: NDArray[np.float64], labels: NDArray[np.int64], anchors: Sequence[int], limit: int
) -> NDArray[np.int64]:
    """Spreads the experts of clusters that are too large over the others.

    If a cluster has more than ``limit`` members, every expert but the anchors is assigned again: the assignment with
    the least sum of distances to the anchors, among all that leave every cluster within its limit. It is solved
    exactly, as a linear assignment of experts to ``limit - 1`` places next to each anchor, so it always ends.

    Args:
        distances_EE: Symmetric ``[E, E]`` distances.
        labels: Cluster of every expert ``[E]``, numbered from 0.
        anchors: The expert of every cluster that stays in it.
        limit: Most experts of one cluster.

    Returns:
        Labels ``[E]`` int64; the same ones if no cluster was too large.

    Raises:
        PlanError: If the clusters together cannot hold all experts.
    """
    experts, clusters = len(labels), len(anchors)
    if limit * clusters < experts:
        raise PlanError(
            f"{clusters} clusters of at most {limit} experts cannot hold {experts} experts.",
            hint=f"allow at least {-(-experts // clusters)} experts in a cluster, or keep more clusters",
        )
    if np.bincount(labels).max() <= limit:
        return labels.copy()
    movable = np.setdiff1d(np.arange(experts), anchors)
    # No cluster can take more than all experts that move.
    places = np.repeat(np.arange(clusters), min(limit - 1, len(movable)))
    to_anchor = distances_EE[np.ix_(movable, np.asarray(anchors))]
    row, place = linear_sum_assignment(to_anchor[:, places])
    limited = labels.copy()
    limited[movable[row]] = places[place]
    return limited
