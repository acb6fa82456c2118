"""Routed experts as products of many tokens with few matrices: sorted by expert, forwards and backwards.

C experts, T tokens, K experts per token, R rows (one per token and choice, sorted by expert), H hidden size, P
pre-activations, I neurons of an expert, X and Y the sides of any of their matrices.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# A CPU builds a kernel for every new number of rows; few distinct numbers keep it fast.
ROW_MULTIPLE = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertMatrices:
    """Tensors of one layer's experts, turned so that tokens are multiplied from the left; views.

    Attributes:
        incoming: ``[C, H, P_i]``: their products with a token, one after the other, are its pre-activations.
        incoming_bias: ``[C, P]``, added to them; ``None`` without biases.
        outgoing: ``[C, I, H]``: the down projections.
        outgoing_bias: ``[C, H]``; ``None`` without biases.
    """

    incoming: tuple[Tensor, ...]
    incoming_bias: Tensor | None = None
    outgoing: Tensor
    outgoing_bias: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Visits:
    """Visits of tokens to experts, sorted by expert.

    Attributes:
        token_R: Token of every row, int64; any token for padding.
        visit_R: Place of every row among the ``T * K`` choices, int64; ``T * K`` for padding.
        expert_R: Expert of every row, int64.
        ends: Where the rows of each expert end, as numbers; ``None`` if only the device knows.
        ends_C: The same as int32 on the device; ``None`` where the numbers are known.
        adds: Whether a backward pass adds to the gradients of the matrices instead of replacing them.
    """

    token_R: Tensor
    visit_R: Tensor
    expert_R: Tensor
    ends: list[int] | None
    ends_C: Tensor | None
    adds: bool = False

    @classmethod
    def on_host(cls, index_TK: Tensor, experts: int, *, multiple: int = ROW_MULTIPLE) -> "Visits":
        """Sorts the choices of a router on the host, and pads the rows of every expert.

        Args:
            index_TK: Chosen experts; -1 for none.
            experts: C.
            multiple: What the rows of every expert are padded to a multiple of.
        """
        device, index = index_TK.device, index_TK.flatten().cpu()
        order = index.argsort(stable=True)
        none, *counts = torch.bincount(index + 1, minlength=experts + 1).tolist()
        padded = [-(-count // multiple) * multiple for count in counts]
        ends = torch.tensor(padded).cumsum(0)
        expert_R = torch.repeat_interleave(torch.arange(experts), torch.tensor(padded))
        shift = (ends - torch.tensor(padded)) - (torch.tensor(counts).cumsum(0) - torch.tensor(counts))
        chosen = order[none:]
        visit_R = torch.full((len(expert_R),), len(index))
        visit_R[torch.arange(len(chosen)) + shift[index[chosen]]] = chosen
        token_R = visit_R % max(1, len(index)) // index_TK.shape[1]
        token_R, visit_R, expert_R = (numbers.to(device) for numbers in (token_R, visit_R, expert_R))
        return cls(token_R=token_R, visit_R=visit_R, expert_R=expert_R, ends=ends.tolist(), ends_C=None)

    @classmethod
    def on_device(cls, index_TK: Tensor, experts: int) -> "Visits":
        """Sorts the choices of a router without waiting for the device.

        A choice of no expert becomes one of the last expert, whose weight must be 0: so all shapes are known.
        """
        index = torch.where(index_TK < 0, experts - 1, index_TK).flatten()
        expert_R, visit_R = index.sort(stable=True)
        numbers = torch.arange(experts, device=index.device, dtype=expert_R.dtype)
        ends_C = torch.searchsorted(expert_R, numbers, right=True).to(torch.int32)
        token_R = visit_R // index_TK.shape[1]
        return cls(token_R=token_R, visit_R=visit_R, expert_R=expert_R, ends=None, ends_C=ends_C)

    def weights(self, weight_TK: Tensor) -> Tensor:
        """Router weight of every row, ``[R, 1]``; 0 for padding. Differentiable."""
        flat = weight_TK.flatten()
        return torch.cat([flat, flat.new_zeros(1)]).index_select(0, self.visit_R)[:, None]

    def product(self, rows_RX: Tensor, matrices_CXY: Tensor) -> Tensor:
        """Every row times the matrix of its expert: ``[R, Y]``."""
        if self.ends is None:
            return F.grouped_mm(rows_RX, matrices_CXY, offs=self.ends_C)
        product_RY = rows_RX.new_empty(len(rows_RX), matrices_CXY.shape[2])
        start = 0
        for end, matrix_XY in zip(self.ends, matrices_CXY, strict=True):
            if end > start:
                torch.mm(rows_RX[start:end], matrix_XY, out=product_RY[start:end])
            start = end
        return product_RY

    def outer(self, rows_RX: Tensor, rows_RY: Tensor, into_CXY: Tensor) -> None:
        """Sums over the rows of every expert of the products of two vectors, written or added to ``into_CXY``."""
        if self.ends is None:
            sums_CXY = F.grouped_mm(rows_RX.T, rows_RY, offs=self.ends_C)
            if self.adds:
                into_CXY.add_(sums_CXY)
            else:
                into_CXY.copy_(sums_CXY)
            return
        start = 0
        for end, into_XY in zip(self.ends, into_CXY, strict=True):
            if self.adds:
                into_XY.add_(rows_RX[start:end].T @ rows_RY[start:end])
            elif end == start:
                into_XY.zero_()
            elif into_XY.dtype == rows_RX.dtype:
                torch.mm(rows_RX[start:end].T, rows_RY[start:end], out=into_XY)
            else:
                into_XY.copy_(rows_RX[start:end].T @ rows_RY[start:end])
            start = end


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainedMatrix:
    """One matrix of every expert, and where its gradient goes.

    Attributes:
        values_CXY: The matrices, in the dtype of the products.
        gradient_CXY: Their gradient, float32; every backward pass writes to it, or adds to it if its visits say so.
        anchor: A tensor that requires a gradient, so that a backward pass comes by.
    """

    values_CXY: Tensor
    gradient_CXY: Tensor
    anchor: Tensor


class _Product(torch.autograd.Function):
    """``Visits.product`` whose backward pass writes the gradient of the matrices into memory that is there already."""

    @staticmethod
    def forward(ctx: Any, rows_RX: Tensor, _anchor: Tensor, matrix: TrainedMatrix, visits: Visits) -> Tensor:
        ctx.save_for_backward(rows_RX)
        ctx.matrix, ctx.visits = matrix, visits
        return visits.product(rows_RX, matrix.values_CXY)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        (rows_RX,), (gradient_RY,) = ctx.saved_tensors, gradients
        matrix, visits = ctx.matrix, ctx.visits
        visits.outer(rows_RX, gradient_RY, matrix.gradient_CXY)
        gradient_RX = visits.product(gradient_RY, matrix.values_CXY.mT) if ctx.needs_input_grad[0] else None
        return gradient_RX, None, None, None


def product(visits: Visits, rows_RX: Tensor, matrix: TrainedMatrix) -> Tensor:
    """Every row times the matrix of its expert, ``[R, Y]``; differentiable in both."""
    result: Tensor = _Product.apply(rows_RX, matrix.anchor, matrix, visits)
    return result


class _SiluGate(torch.autograd.Function):
    """``silu(gate) * up`` of pre-activations that hold gate and up one after the other."""

    @staticmethod
    def forward(ctx: Any, pre_RP: Tensor) -> Tensor:
        gate_RI, up_RI = pre_RP.chunk(2, dim=-1)
        opened_RI = F.silu(gate_RI)
        ctx.save_for_backward(pre_RP, opened_RI)
        return opened_RI * up_RI

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        pre_RP, opened_RI = ctx.saved_tensors
        (gradient_RI,) = gradients
        gate_RI, up_RI = pre_RP.chunk(2, dim=-1)
        result_RP = torch.empty_like(pre_RP)
        closed_RI, through_RI = result_RP.chunk(2, dim=-1)
        torch.mul(gradient_RI, opened_RI, out=through_RI)
        torch.ops.aten.silu_backward.grad_input(gradient_RI * up_RI, gate_RI, grad_input=closed_RI)
        return result_RP


def silu_gate(pre_RP: Tensor) -> Tensor:
    """``silu(gate) * up`` of pre-activations ``[gate, up]``, with a backward pass that copies nothing."""
    result: Tensor = _SiluGate.apply(pre_RP)
    return result
