"""K-means: every expert joins the nearest centre, every centre moves to the mean of its experts."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from hcsmoe_hub.options import KMeansStart

MAX_ITERATIONS = 100


def kmeans(
    coordinates: Sequence[NDArray[np.float64]], clusters: int, start: KMeansStart, seed: int
) -> NDArray[np.int64]:
    """Groups experts by Lloyd's algorithm, until no expert changes its cluster or for 100 rounds.

    Several representations of the experts have centres of their own; an expert joins the cluster j with the least sum
    of distances ``sum_r ||e_ri - c_rj||_2`` over the representations r. A cluster that loses all its experts takes the
    one that is farthest from its own centre and not alone there.

    Args:
        coordinates: Points ``[E, D]`` float64 of every representation, scaled so that their distances can be added.
        clusters: K, between 1 and E.
        start: First centres: the first K experts (K-means-fix of HC-SMoE), K random ones (K-means-rnd), or k-means++.
        seed: Seed of a random start.

    Returns:
        Labels ``[E]`` int64, exactly K different ones between 0 and K - 1; the lowest of equally near centres.
    """
    seeds = _first_centres(coordinates, clusters, start, np.random.default_rng(seed))
    centres = [points_ED[seeds] for points_ED in coordinates]
    labels = _assign(coordinates, centres)
    for _ in range(MAX_ITERATIONS):
        centres = [
            np.stack([points_ED[labels == label].mean(axis=0) for label in range(clusters)])
            for points_ED in coordinates
        ]
        previous, labels = labels, _assign(coordinates, centres)
        if (labels == previous).all():
            break
    return labels


def _first_centres(
    coordinates: Sequence[NDArray[np.float64]], clusters: int, start: KMeansStart, generator: np.random.Generator
) -> NDArray[np.int64]:
    """K different experts."""
    experts = len(coordinates[0])
    match start:
        case KMeansStart.FIRST:
            return np.arange(clusters)
        case KMeansStart.RANDOM:
            return generator.permutation(experts)[:clusters]
        case KMeansStart.PLUS_PLUS:
            return plus_plus_seeds(coordinates, clusters, generator)


def plus_plus_seeds(
    coordinates: Sequence[NDArray[np.float64]], clusters: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Draws K experts that are far apart (k-means++, Arthur and Vassilvitskii 2007).

    The first is drawn uniformly, each other with a probability proportional to the square of its distance to the
    nearest one drawn before. Where all others coincide with one of them, the lowest number that is left is taken.

    Args:
        coordinates: Points ``[E, D]`` float64 of every representation; their distances are added.
        clusters: K, between 1 and E.
        generator: Source of randomness.

    Returns:
        K different experts ``[K]`` int64, in the order they were drawn.
    """
    experts = len(coordinates[0])
    seeds = [int(generator.integers(experts))]
    nearest_E = np.full(experts, np.inf)
    while len(seeds) < clusters:
        last = [points_ED[seeds[-1:]] for points_ED in coordinates]
        nearest_E = np.minimum(nearest_E, _distances(coordinates, last)[:, 0])
        weights_E = np.square(nearest_E)
        if weights_E.sum() > 0:
            seeds.append(int(generator.choice(experts, p=weights_E / weights_E.sum())))
        else:
            seeds.append(int(np.setdiff1d(np.arange(experts), seeds)[0]))
    return np.array(seeds)


def _distances(
    coordinates: Sequence[NDArray[np.float64]], centres: Sequence[NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Sum over the representations of the distances ``[E, C]`` to every centre."""
    total: NDArray[np.float64] = np.sum(
        [cdist(points_ED, centre_CD) for points_ED, centre_CD in zip(coordinates, centres, strict=True)], axis=0
    )
    return total


def _assign(coordinates: Sequence[NDArray[np.float64]], centres: Sequence[NDArray[np.float64]]) -> NDArray[np.int64]:
    """The nearest centre of every expert, such that no centre is without experts."""
    distances_EC = _distances(coordinates, centres)
    labels = distances_EC.argmin(axis=1)
    own_E = distances_EC.min(axis=1)
    size_C = np.bincount(labels, minlength=distances_EC.shape[1])
    for empty in np.flatnonzero(size_C == 0):
        moved = int(np.where(size_C[labels] > 1, own_E, -1.0).argmax())
        size_C[labels[moved]] -= 1
        size_C[empty] += 1
        labels[moved] = empty
    return labels
