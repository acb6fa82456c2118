"""Distances between experts whose feature is too long to be built: all their weights, one behind the other."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hcsmoe_hub.methods.clustering.distances import gram_distances
from hcsmoe_hub.options import Distance

# 16 MB in float32, so that all copies of a block together stay below 100 MB.
BLOCK_ELEMENTS = 2**22


def row_distances(rows: Iterable[Tensor], distance: Distance) -> NDArray[np.float64]:
    """Distances between experts over the concatenation of several tensors, without ever building it.

    With the mean expert m and ``c_i = e_i - m``, the distances follow from inner products that are summed over blocks
    of columns: ``|e_i - e_j|^2 = c_i c_i + c_j c_j - 2 c_i c_j`` and ``e_i e_j = c_i c_j + c_i m + m c_j + m m``.
    Without the mean, little is left of experts that are close, and their differences do not cancel.

    Args:
        rows: Tensors ``[E, ...]`` of any float dtype, such as every weight matrix of the experts; each is read once and
            used before the next is asked for.
        distance: Euclidean or cosine.

    Returns:
        Symmetric ``[E, E]`` float64 matrix with a zero diagonal.

    Raises:
        ValueError: If there is no tensor, or the distance is not one between two vectors.
    """
    gram: Tensor | None = None
    for block_EF in _blocks(rows):
        mean_F = block_EF.mean(dim=0, keepdim=True)
        # The last row is the mean. Differences of narrower numbers are exact enough in float32, their products are not.
        parts = torch.cat([block_EF - mean_F, mean_F]).double()
        products = (parts @ parts.T).cpu()
        gram = products if gram is None else gram + products
    if gram is None:
        raise ValueError("distances need at least one tensor")
    experts = len(gram) - 1
    match distance:
        case Distance.EUCLIDEAN:
            return gram_distances(gram[:experts, :experts].numpy(), distance)
        case Distance.COSINE:
            restore = np.hstack([np.eye(experts), np.ones((experts, 1))])
            return gram_distances(restore @ gram.numpy() @ restore.T, distance)
        case Distance.KL_DIVERGENCE | Distance.WASSERSTEIN:
            raise ValueError(f"{distance} is not a distance between two vectors")


def _blocks(rows: Iterable[Tensor]) -> Iterator[Tensor]:
    """Columns of all tensors ``[E, F]`` in float32 or wider, a limited number at a time."""
    for tensor in rows:
        columns = tensor if tensor.dim() > 1 else tensor[:, None]
        # Slices of the second dimension: a view with gaps is copied slice by slice, not as a whole.
        step = max(1, BLOCK_ELEMENTS * columns.shape[1] // max(columns.numel(), 1))
        for block in columns.split(step, dim=1):
            yield block.to(torch.promote_types(block.dtype, torch.float32)).flatten(1)
