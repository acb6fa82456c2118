"""How much the outputs of two experts differ on the same tokens."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import squareform
from torch import Tensor

from hcsmoe_hub.options import Distance

# 32 MB in float64.
BLOCK_ELEMENTS = 2**22


def overlap_distances(chunks: Iterable[Tensor], distance: Distance) -> NDArray[np.float64]:
    """Distances between the outputs of experts token by token, averaged over tokens (code of HC-SMoE).

    KL divergence: with the softmax p of each output over the hidden size, the symmetric divergence
    ``(KL(p_i || p_j) + KL(p_j || p_i)) / 2 = sum_h (p_i - p_j) (log p_i - log p_j) / 2``. Wasserstein: the mean over
    the hidden size of ``|sort(x_i) - sort(x_j)|``, the distance of order 1 between the entries of two outputs.

    Args:
        chunks: Raw outputs ``[E, T, H]`` of all experts for some tokens, any float dtype; the chunks together hold the
            tokens, and how they are divided changes nothing but rounding.
        distance: KL divergence (in nats) or Wasserstein.

    Returns:
        Symmetric ``[E, E]`` float64 matrix with a zero diagonal, never negative.

    Raises:
        ValueError: If there is no token, or the distance is one between two vectors.
    """
    total: Tensor | None = None
    tokens = 0
    for chunk_ETH in chunks:
        step = max(1, BLOCK_ELEMENTS * chunk_ETH.shape[1] // max(chunk_ETH.numel(), 1))
        for block_ETH in chunk_ETH.split(step, dim=1):
            match distance:
                case Distance.KL_DIVERGENCE:
                    sums_EE = _divergences(block_ETH.double()).cpu()
                case Distance.WASSERSTEIN:
                    sums_EE = _sorted_differences(block_ETH.double()).cpu()
                case Distance.EUCLIDEAN | Distance.COSINE:
                    raise ValueError(f"{distance} does not compare outputs token by token")
            total = sums_EE if total is None else total + sums_EE
            tokens += block_ETH.shape[1]
    if total is None or tokens == 0:
        raise ValueError("distances need at least one token")
    means_EE = ((total + total.T) / (2 * tokens)).numpy()
    distances: NDArray[np.float64] = np.maximum(means_EE, 0)
    np.fill_diagonal(distances, 0)
    return distances


def _divergences(outputs_ETH: Tensor) -> Tensor:
    """Symmetric KL divergences ``[E, E]``, summed over tokens."""
    logarithms = outputs_ETH.log_softmax(dim=-1)
    probabilities = logarithms.exp()
    # What the logarithms of all experts have in common drops out; left in, it would be most of every product.
    deviations = logarithms - logarithms.mean(dim=0)
    cross_EE = probabilities.flatten(1) @ deviations.flatten(1).T
    own_E = cross_EE.diagonal()
    return (own_E[:, None] + own_E[None] - cross_EE - cross_EE.T) / 2


def _sorted_differences(outputs_ETH: Tensor) -> Tensor:
    """Mean absolute differences of the sorted entries of each output ``[E, E]``, summed over tokens."""
    entries = outputs_ETH.sort(dim=-1).values.flatten(1)
    # Each pair once, on the device of the outputs.
    pairs = torch.pdist(entries, p=1) / outputs_ETH.shape[-1]
    return torch.from_numpy(squareform(pairs.cpu().numpy()))
