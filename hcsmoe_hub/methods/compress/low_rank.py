"""Low-rank factors of a matrix that lose the least of its output on given inputs.

O outputs, I inputs, R rank.
"""

import torch
from torch import Tensor

from hcsmoe_hub.methods.compress.whitening import SMALLEST, Whitening


def whitened_svd(weight_OI: Tensor, inputs: Whitening, rank: int) -> tuple[Tensor, Tensor]:
    """The matrices ``U`` and ``V`` of a rank that minimise ``||(W - U V) L||_F`` with ``L L^T`` the Gram matrix.

    That is the root of the summed squared error of the output on the inputs that the Gram matrix was summed over. Of
    the singular value decomposition of ``W L``, only the smaller side is computed: from ``W G W^T`` where there are
    fewer outputs, otherwise from ``L^T W^T W L``. U and V share the singular values as in the paper,
    ``U = A sqrt(D)`` and ``V = sqrt(D) B``, as far as their columns and rows have the same norms.

    Args:
        weight_OI: ``[O, I]`` float64.
        inputs: The inputs x that its outputs are wanted for.
        rank: R, at most the smaller of O and I.

    Returns:
        ``[O, R]`` and ``[R, I]`` float64.
    """
    if weight_OI.shape[0] <= weight_OI.shape[1]:
        _, basis_OO = torch.linalg.eigh(weight_OI @ inputs.gram_II @ weight_OI.T)
        left_OR = basis_OO[:, -rank:].flip(1)
        return _balanced(left_OR, left_OR.T @ weight_OI)
    root_II, inverse_II = inputs.roots
    seen_OI = weight_OI @ root_II
    _, basis_II = torch.linalg.eigh(seen_OI.T @ seen_OI)
    right_IR = basis_II[:, -rank:].flip(1)
    return _balanced(seen_OI @ right_IR, right_IR.T @ inverse_II)


def fit_left(weight_OI: Tensor, right_RI: Tensor, inputs: Whitening) -> Tensor:
    """The factor ``U`` that minimises ``||(W - U V) L||_F`` for a given ``V``, by least squares.

    Args:
        weight_OI: ``[O, I]`` float64.
        right_RI: V, ``[R, I]`` float64.
        inputs: The inputs x that the outputs are wanted for.

    Returns:
        ``[O, R]`` float64.
    """
    seen_IR = inputs.gram_II @ right_RI.T
    # Rows of V may depend on each other: the rank may exceed that of the matrix.
    solved = torch.linalg.pinv(right_RI @ seen_IR, hermitian=True, rtol=SMALLEST)
    return weight_OI @ seen_IR @ solved


def _balanced(left_OR: Tensor, right_RI: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with equal norms of each column of U and the row of V that belongs to it."""
    sizes = right_RI.norm(dim=1) / left_OR.norm(dim=0).clamp(min=torch.finfo(left_OR.dtype).tiny)
    scale_R = torch.where(sizes > 0, sizes, 1.0).sqrt()
    return left_OR * scale_R, right_RI / scale_R[:, None]
