"""Which rows of the sparse part are worth keeping.

O outputs, I inputs.
"""

import torch
from torch import Tensor


def row_importance(residual_OI: Tensor, gram_II: Tensor) -> Tensor:
    """The importance of every row of S: the mean of ``|s * dL/ds|`` over its entries (MC-SMoE, section 3.2).

    A row of a matrix that is applied from the left is an output neuron, a column in the notation of the paper. L is
    half of the squared error of the output without S, on the inputs that the Gram matrix was summed over, so that its
    gradient is ``-S G``: nothing has to be trained. Signed, the entries of a row add up to twice what the row takes
    off the loss.

    Args:
        residual_OI: S with all of its rows, ``[O, I]``.
        gram_II: Sum of ``x x^T`` over inputs x, ``[I, I]``.

    Returns:
        ``[O]``, not negative.
    """
    return (residual_OI * (residual_OI @ gram_II)).abs().mean(dim=1)


def most_important(importance_O: Tensor, count: int) -> Tensor:
    """Numbers of the rows with the highest importance, ascending; of equal ones, the first.

    Args:
        importance_O: ``[O]``.
        count: How many; 0 is none.

    Returns:
        ``[count]`` int64.
    """
    return torch.sort(importance_O, descending=True, stable=True).indices[:count].sort().values
