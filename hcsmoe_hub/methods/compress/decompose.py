"""``W ~ U V + S`` of one matrix: what is low rank, and the rows that are not.

O outputs, I inputs, R rank, C kept rows.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hcsmoe_hub.methods.compress.importance import most_important, row_importance
from hcsmoe_hub.methods.compress.low_rank import fit_left, whitened_svd
from hcsmoe_hub.methods.compress.whitening import Whitening

# After a few rounds the choice of rows hardly changes.
MAX_ROUNDS = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decomposition:
    """A matrix in parts, ``W ~ U V + S``.

    Attributes:
        left_OR: U.
        right_RI: V.
        rows_C: Rows that S keeps, int64, ascending; all others of S are zero.
        sparse_CI: These rows of S.
    """

    left_OR: Tensor
    right_RI: Tensor
    rows_C: Tensor
    sparse_CI: Tensor

    def dense(self) -> Tensor:
        """``U V + S`` as one matrix, ``[O, I]`` float64."""
        left_OR, right_RI, sparse_CI = (
            part.to(torch.float64) for part in (self.left_OR, self.right_RI, self.sparse_CI)
        )
        return (left_OR @ right_RI).index_add(0, self.rows_C, sparse_CI)


def decompose(
    weight_OI: Tensor, inputs: Whitening, *, rank: int, rows: int, dtype: torch.dtype = torch.float64
) -> Decomposition:
    """Splits a matrix into factors and a few rows, without training.

    In the order of the paper: U and V from the singular value decomposition (here of the whitened matrix, since no
    training follows), S from what they miss, and of S the rows of the highest importance. Rows of S hold whatever U V
    does not, so U and V need not look at them: they are found again on the other rows, and the rows of S again, as
    long as that lowers the error. At the end V is rounded to the dtype in which it will be stored, U is solved for
    again by least squares and rounded, and S takes up what both miss in its rows.

    Args:
        weight_OI: ``[O, I]``, any floating dtype.
        inputs: The inputs x that its outputs are wanted for.
        rank: R, at most the smaller of O and I.
        rows: C, at most O.
        dtype: Dtype of the parts that are returned.

    Returns:
        The parts, in ``dtype`` and on the device of the matrix.
    """
    weight_OI = weight_OI.to(torch.float64)
    best, least = _split(weight_OI, inputs, rank=rank, kept_C=_none(weight_OI), rows=rows)
    for _ in range(MAX_ROUNDS if rows else 0):
        found, error = _split(weight_OI, inputs, rank=rank, kept_C=best.rows_C, rows=rows)
        if error >= least:
            break
        best, least = found, error
    return _rounded(best, weight_OI, inputs, dtype)


def _split(
    weight_OI: Tensor, inputs: Whitening, *, rank: int, kept_C: Tensor, rows: int
) -> tuple[Decomposition, float]:
    """U and V for all rows but some, the rows of S that suit them, and the squared error of the output."""
    others = torch.ones(len(weight_OI), dtype=torch.bool, device=weight_OI.device)
    others[kept_C] = False
    size = min(rank, int(others.sum()))
    _, right_RI = whitened_svd(weight_OI[others], inputs, size) if size else (None, weight_OI[:0])
    # More rows are kept than the rank leaves: the factors beyond it stay zero.
    right_RI = torch.cat([right_RI, right_RI.new_zeros(rank - size, right_RI.shape[1])])
    left_OR = fit_left(weight_OI, right_RI, inputs)
    residual_OI = weight_OI - left_OR @ right_RI
    rows_C = most_important(row_importance(residual_OI, inputs.gram_II), rows)
    found = Decomposition(left_OR=left_OR, right_RI=right_RI, rows_C=rows_C, sparse_CI=residual_OI[rows_C])
    return found, inputs.energy(weight_OI - found.dense())


def _none(weight_OI: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=weight_OI.device)


def _rounded(found: Decomposition, weight_OI: Tensor, inputs: Whitening, dtype: torch.dtype) -> Decomposition:
    """The parts in the dtype in which they are stored, each making up for the rounding of those before it."""
    right_RI = found.right_RI.to(dtype).to(weight_OI.dtype)
    left_OR = fit_left(weight_OI, right_RI, inputs).to(dtype).to(weight_OI.dtype)
    missed_CI = (weight_OI - left_OR @ right_RI)[found.rows_C]
    return replace(found, left_OR=left_OR.to(dtype), right_RI=right_RI.to(dtype), sparse_CI=missed_CI.to(dtype))
