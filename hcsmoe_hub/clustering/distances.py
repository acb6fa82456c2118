"""How far apart two experts are, given one feature vector each."""

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
        distance: Which distance.

    Returns:
        Symmetric ``[E, E]`` matrix with a zero diagonal.
    """
    features = features_EF.double().cpu().numpy()
    distances: NDArray[np.float64] = squareform(pdist(features, metric=distance.value))
    if distance is Distance.COSINE:
        # A zero vector has no direction: it is as far from every other as orthogonal vectors are.
        is_zero = ~features.any(axis=1)
        distances[is_zero] = distances[:, is_zero] = 1.0
        # Two zero vectors are equal.
        distances[np.ix_(is_zero, is_zero)] = 0.0
    return distances
