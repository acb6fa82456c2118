"""How far apart experts are, given one feature vector each, or the inner products of these vectors."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from hcsmoe_hub.options import Distance


def pairwise_distances(features_EF: Tensor, distance: Distance) -> NDArray[np.float64]:
    """Distances between all pairs of experts, in float64.

    Euclidean: ``d(i, j) = ||e_i - e_j||_2`` (HC-SMoE, eq. 5), from direct differences: the expansion
    ``|x|^2 - 2xy + |y|^2`` cancels for experts that are close. Cosine: ``1 - cos(e_i, e_j)``.

    Args:
        features_EF: One feature vector per expert, any float dtype.
        distance: Euclidean or cosine.

    Returns:
        Symmetric ``[E, E]`` matrix with a zero diagonal.

    Raises:
        ValueError: If the distance is not one between two vectors.
    """
    features: NDArray[np.float64] = features_EF.double().cpu().numpy()
    match distance:
        case Distance.EUCLIDEAN:
            distances: NDArray[np.float64] = squareform(pdist(features, "euclidean"))
        case Distance.COSINE:
            distances = squareform(pdist(features, "cosine"))
            _place_zero_vectors(distances, np.asarray(~features.any(axis=1)))
        case Distance.KL_DIVERGENCE | Distance.WASSERSTEIN:
            raise ValueError(f"{distance} is not a distance between two vectors")
    return distances


def gram_distances(gram_EE: NDArray[np.float64], distance: Distance) -> NDArray[np.float64]:
    """Distances between vectors of which only the inner products G are known.

    Euclidean: ``d(i, j) = sqrt(max(0, G_ii + G_jj - 2 G_ij))``. Cosine: ``1 - G_ij / sqrt(G_ii G_jj)``. Distances that
    are far below the length of the vectors cancel; take the Gram matrix of centred vectors where that matters.

    Args:
        gram_EE: Inner products ``[E, E]``, float64.
        distance: Euclidean or cosine.

    Returns:
        Symmetric ``[E, E]`` matrix with a zero diagonal.

    Raises:
        ValueError: If the distance is not one between two vectors.
    """
    # A blocked matrix product may round G_ij and G_ji differently.
    symmetric_EE = (gram_EE + gram_EE.T) / 2
    square_E = symmetric_EE.diagonal()
    match distance:
        case Distance.EUCLIDEAN:
            distances = np.sqrt(np.maximum(square_E[:, None] + square_E[None] - 2 * symmetric_EE, 0))
        case Distance.COSINE:
            is_zero = square_E == 0
            length_E = np.sqrt(np.where(is_zero, 1.0, square_E))
            distances = np.maximum(1 - symmetric_EE / np.outer(length_E, length_E), 0)
            _place_zero_vectors(distances, is_zero)
        case Distance.KL_DIVERGENCE | Distance.WASSERSTEIN:
            raise ValueError(f"{distance} is not a distance between two vectors")
    np.fill_diagonal(distances, 0)
    return distances


def _place_zero_vectors(cosine_EE: NDArray[np.float64], is_zero: NDArray[np.bool_]) -> None:
    """Gives vectors without a direction their cosine distances."""
    # As far from every other as orthogonal vectors are.
    cosine_EE[is_zero] = cosine_EE[:, is_zero] = 1.0
    # Two zero vectors are equal.
    cosine_EE[np.ix_(is_zero, is_zero)] = 0.0


def normalised(distances_EE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divides distances by their mean over all pairs, so that those of several similarities can be added.

    Args:
        distances_EE: Symmetric ``[E, E]`` distances with a zero diagonal.

    Returns:
        Distances with a mean of 1 over all pairs of different experts; zeros if all experts are equal.
    """
    experts = len(distances_EE)
    total = distances_EE.sum()
    return distances_EE * (experts * (experts - 1) / total) if total != 0 else distances_EE.copy()


def joined_distances(distances: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """One distance from those of several similarities: the sum of the normalised ones.

    Args:
        distances: Symmetric ``[E, E]`` distances with a zero diagonal, one matrix per similarity.

    Returns:
        Symmetric ``[E, E]`` distances; those of a single similarity as they are.
    """
    if len(distances) == 1:
        return distances[0]
    joined: NDArray[np.float64] = np.sum([normalised(matrix_EE) for matrix_EE in distances], axis=0)
    return joined
