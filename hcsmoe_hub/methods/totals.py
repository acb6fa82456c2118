"""Sums that do not depend on the number of threads."""

import torch
from torch import Tensor

# torch adds up fewer numbers than 32,768 on one thread.
ONE_THREAD = 1 << 14


def total(values: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The sum of all numbers of a tensor, always in the same order; differentiable.

    On a CPU, ``Tensor.sum`` over a whole tensor cuts it into as many parts as there are threads. Sums along a dimension
    are not cut.

    Args:
        values: Numbers in any shape.
        dtype: To add up in; that of the numbers by default.

    Returns:
        A tensor without dimensions.
    """
    while values.dim() > 1:
        values = values.sum(-1, dtype=dtype)
    if values.numel() <= ONE_THREAD:
        return values.sum(dtype=dtype)
    return torch.stack([part.sum(dtype=dtype) for part in values.split(ONE_THREAD)]).sum()


def root_mean_square(values: Tensor) -> Tensor:
    """The root of the mean square of all numbers of a tensor, summed as ``total`` does."""
    return (total(values.square()) / max(1, values.numel())).sqrt()
