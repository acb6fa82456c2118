"""Fuzzy c-means: every expert belongs to every cluster, more to those that are near."""

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from hcsmoe_hub.methods.clustering.kmeans import plus_plus_seeds

MAX_ITERATIONS = 300
# Largest change of a membership at which the iteration ends, and below which memberships count as equal.
TOLERANCE = 1e-6


def fuzzy_memberships(points_ED: NDArray[np.float64], clusters: int, seed: int) -> NDArray[np.float64]:
    """Memberships of fuzzy c-means with the exponent m = 2 (HC-SMoE, B.5; Bezdek 1981).

    ``c_j = sum_i u_ij^2 e_i / sum_i u_ij^2`` and ``u_ij = 1 / sum_k (|e_i - c_j| / |e_i - c_k|)^2`` in turn lower
    ``sum_ij u_ij^2 |e_i - c_j|^2``, from a start by k-means++ until no membership changes by more than 1e-6, or for
    300 rounds. The paper prints the objective (eq. 13) without the exponent, which its own updates need.

    Args:
        points_ED: One point per expert, float64.
        clusters: K, between 1 and E.
        seed: Seed of the start.

    Returns:
        Memberships ``[E, K]`` float64, rows summing to 1. An expert that coincides with a centre belongs to it alone,
        in equal parts if there are several such centres.
    """
    centres_CD = points_ED[plus_plus_seeds([points_ED], clusters, np.random.default_rng(seed))]
    membership_EC = _memberships(points_ED, centres_CD)
    for _ in range(MAX_ITERATIONS):
        weight_EC = np.square(membership_EC)
        total_C = weight_EC.sum(axis=0)[:, None]
        # A centre to which no expert belongs at all stays where it is.
        centres_CD = np.divide(weight_EC.T @ points_ED, total_C, out=centres_CD.copy(), where=total_C > 0)
        previous, membership_EC = membership_EC, _memberships(points_ED, centres_CD)
        if np.abs(membership_EC - previous).max() <= TOLERANCE:
            break
    return membership_EC


def _memberships(points_ED: NDArray[np.float64], centres_CD: NDArray[np.float64]) -> NDArray[np.float64]:
    """Memberships for given centres."""
    squares_EC = cdist(points_ED, centres_CD, "sqeuclidean")
    least_E1 = squares_EC.min(axis=1, keepdims=True)
    # Relative to the nearest centre, so that nothing is divided by zero or overflows.
    nearness_EC = np.divide(least_E1, squares_EC, out=np.ones_like(squares_EC), where=squares_EC > 0)
    memberships: NDArray[np.float64] = nearness_EC / nearness_EC.sum(axis=1, keepdims=True)
    return memberships


def hard_labels(membership_EC: NDArray[np.float64]) -> NDArray[np.int64]:
    """One cluster per expert, and at least one expert per cluster.

    Every expert goes to the cluster of its greatest membership; among memberships that differ by at most 1e-6, to the
    first. Then each cluster that is still empty, from the first to the last, takes the expert that belongs to it most
    among all that are not alone in their cluster; among equals, the lowest number.

    Args:
        membership_EC: Memberships ``[E, K]`` with E >= K.

    Returns:
        Labels ``[E]`` int64, exactly K different ones between 0 and K - 1.
    """
    labels = (membership_EC >= membership_EC.max(axis=1, keepdims=True) - TOLERANCE).argmax(axis=1)
    size_C = np.bincount(labels, minlength=membership_EC.shape[1])
    for empty in np.flatnonzero(size_C == 0):
        wish_E = np.where(size_C[labels] > 1, membership_EC[:, empty], -1.0)
        moved = int((wish_E >= wish_E.max() - TOLERANCE).argmax())
        size_C[labels[moved]] -= 1
        size_C[empty] += 1
        labels[moved] = empty
    return labels
