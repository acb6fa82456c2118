"""Weighted averages of experts, tensor by tensor.

E source experts, C merged experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# On the host the wide intermediate stays in the processor's cache and adds nothing to the peak.
BLOCK = 1 << 18


def _block(rows: Tensor) -> int:
    """Elements that are summed at once; of an accelerator, which would wait for one start after the other, all."""
    return BLOCK if rows.is_cpu else max(1, rows.numel())


def merge_rows(rows_E: Tensor, share_EC: Tensor) -> Tensor:
    """Weighted sums of experts: ``E_C = sum_i w_iC E_i``.

    Sums in float32 (float64 for float64 input) and rounds once. A merged expert that is one source expert with a share
    of 1 keeps its bits; an expert without a share is not read.

    Args:
        rows_E: ``[E, ...]``, one entry per source expert.
        share_EC: Shares from ``member_shares``, ``[E, C]``.

    Returns:
        ``[C, ...]`` in the dtype of ``rows_E``.
    """
    if ((share_EC > 0).sum(1) > 1).any():
        return _overlapping(rows_E, share_EC)
    merged_C = rows_E.new_empty((share_EC.shape[1], *rows_E.shape[1:]))
    for number, share_E in enumerate(share_EC.T.tolist()):
        members = [expert for expert, share in enumerate(share_E) if share]
        weights = [share_E[expert] for expert in members]
        if weights == [1.0]:
            merged_C[number] = rows_E[members[0]]
            continue
        blocks = [rows_E[expert].reshape(-1).split(_block(rows_E)) for expert in members]
        targets = merged_C[number].view(-1).split(_block(rows_E))
        for target, *parts in zip(targets, *blocks, strict=True):
            target.copy_(_weighted_sum(parts, weights))
    return merged_C


def _overlapping(rows_E: Tensor, share_EC: Tensor) -> Tensor:
    """Weighted sums of which many read the same experts: every expert is read once for all of them."""
    wide = torch.promote_types(rows_E.dtype, torch.float32)
    share_CE = share_EC.T.to(rows_E.device, wide)
    # One number per expert has no second dimension to cut along.
    rows_EN = rows_E if rows_E.dim() > 1 else rows_E[:, None]
    merged_CN = rows_EN.new_empty((len(share_CE), *rows_EN.shape[1:]))
    length = max(1, _block(rows_EN) // rows_EN[:, 0].numel())
    for target_CN, part_EN in zip(merged_CN.split(length, 1), rows_EN.split(length, 1), strict=True):
        target_CN.copy_(torch.tensordot(share_CE, part_EN.to(wide), 1))
    return merged_CN.view(-1, *rows_E.shape[1:])


def _weighted_sum(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_i w_i x_i`` of equally shaped tensors, in float32 or wider."""
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    total = parts[0].to(wide) * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.add_(part, alpha=weight)
    return total
