"""Singular values of matrices, and the stable rank that follows from them."""

import torch
from torch import Tensor


def singular_values(weight_OI: Tensor) -> Tensor:
    """Singular values of a matrix, the largest first.

    Args:
        weight_OI: ``[O, I]``, any floating dtype.

    Returns:
        ``[min(O, I)]`` float64.
    """
    wide_OI = weight_OI.to(torch.float64)
    return torch.linalg.svdvals(wide_OI)


def stable_rank(values_R: Tensor) -> float:
    """``||W||_F^2 / ||W||_2^2`` of a matrix: between 1 and its rank, and 0 for a matrix of zeros.

    Args:
        values_R: Its singular values.
    """
    squares_R = values_R.square()
    largest = float(squares_R.max())
    return float(squares_R.sum()) / largest if largest else 0.0
