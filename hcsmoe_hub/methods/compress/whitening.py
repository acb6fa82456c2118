"""The inputs of a matrix, as a Gram matrix and its root.

I inputs.
"""

from functools import cached_property

import torch
from torch import Tensor

from hcsmoe_hub.methods.totals import total

# Directions with a smaller share of the largest are rounding of sums in float32.
SMALLEST = 1e-7


class Whitening:
    """What is known of the inputs of a matrix.

    Args:
        gram_II: Sum of ``x x^T`` over inputs x, ``[I, I]``; of zeros, all inputs count the same.

    Attributes:
        gram_II: The same in float64.
    """

    def __init__(self, gram_II: Tensor) -> None:
        self.gram_II = gram_II.to(torch.float64)
        if not self.gram_II.any():
            self.gram_II = torch.eye(len(gram_II), dtype=torch.float64, device=gram_II.device)

    @cached_property
    def roots(self) -> tuple[Tensor, Tensor]:
        """A matrix L with ``L L^T = G``, and its inverse, ``[I, I]`` float64 each.

        Eigenvectors give both, also where few or dependent inputs leave no Cholesky factor: what they lack is taken
        for small.
        """
        values_I, vectors_II = torch.linalg.eigh(self.gram_II)
        sizes_I = values_I.clamp(min=SMALLEST * float(values_I[-1])).sqrt()
        return vectors_II * sizes_I, (vectors_II / sizes_I).T

    def energy(self, matrix_OI: Tensor) -> float:
        """Summed squared output of a matrix ``[O, I]`` on the inputs."""
        wide_OI = matrix_OI.to(torch.float64)
        return float(total(wide_OI @ self.gram_II * wide_OI))
