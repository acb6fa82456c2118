"""Steps for the weights before an expert's activation function: nonlinear, so linearised and solved as least squares.

R tokens routed to one expert, P pre-activations (I without a gate, 2I with one), I neurons, H hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Conjugate-gradient iterations per step; stopping early is what keeps a step from following noise.
ITERATIONS = 5
LENGTHS = (1.0, 0.5, 0.25, 0.125)


def _transposed(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Value of a function, and the transpose of its derivative there."""
    value, pull = torch.func.vjp(function, at)[:2]
    return value, lambda output: pull(output)[0]


class Linearised:
    """One expert's router-weighted output as a linear function of small changes of its input matrices.

    ``y(W + S) ~ y(W) + g * (phi'(W x) . S x) D``, with router weight g, gating phi and down projection D.

    Args:
        inputs_RH: Tokens that go into the expert, float32.
        pre_RP: Pre-activations ``W x`` there, float32.
        weight_R1: Router weights, float32.
        down_IH: Down projection, float32.
        gate: From pre-activations ``[R, P]`` to hidden activations ``[R, I]``; elementwise in the neurons.
    """

    def __init__(
        self, *, inputs_RH: Tensor, pre_RP: Tensor, weight_R1: Tensor, down_IH: Tensor, gate: Callable[[Tensor], Tensor]
    ) -> None:
        self._inputs_RH = inputs_RH
        self._pre_RP = pre_RP
        self._weight_R1 = weight_R1
        self._down_IH = down_IH
        self._gate = gate
        # Both derivatives are kept, so that no iteration runs the gate again.
        hidden_RI, self._pull_gate = _transposed(gate, pre_RP)
        _, self._push_gate = _transposed(self._pull_gate, torch.zeros_like(hidden_RI))
        self._output_RH = (weight_R1 * hidden_RI) @ down_IH

    def change(self, step_PH: Tensor) -> Tensor:
        """What a step really changes in the output: ``[R, H]``."""
        hidden_RI = self._gate(self._pre_RP + self._inputs_RH @ step_PH.T)
        return (self._weight_R1 * hidden_RI) @ self._down_IH - self._output_RH

    def push(self, step_PH: Tensor) -> Tensor:
        """What a step changes in the linearised output: ``[R, H]``."""
        hidden_RI = self._push_gate(self._inputs_RH @ step_PH.T)
        return (self._weight_R1 * hidden_RI) @ self._down_IH

    def pull(self, output_RH: Tensor) -> Tensor:
        """The transpose of ``push``: ``[P, H]``."""
        pre_RP = self._pull_gate((self._weight_R1 * output_RH) @ self._down_IH.T)
        return pre_RP.T @ self._inputs_RH

    def curvature(self) -> Tensor:
        """Diagonal of ``pull(push(.))``, neuron by token feature, as if the two were independent: ``[P, H]``.

        Each factor is raised by its own mean, so that a neuron which rarely fires takes no long step.
        """
        pre_RP = self._pull_gate(self._weight_R1 * self._down_IH.norm(dim=1))
        row_P, column_H = pre_RP.square().sum(0), self._inputs_RH.square().mean(0)
        return (row_P + row_P.mean())[:, None] * (column_H + column_H.mean())


def fit_inputs(expert: Linearised, lacking_RH: Tensor) -> tuple[Tensor, Tensor] | None:
    """A step that brings the expert's output nearer to what the layer lacks.

    The linearised problem ``min_S ||lacking - push(S)||`` is convex; ``ITERATIONS`` conjugate-gradient iterations with
    a diagonal preconditioner solve it as far as the data supports it. The step is then shortened until the exact output
    comes nearer, too.

    Args:
        expert: The expert as it is.
        lacking_RH: What the layer's output lacks on the expert's tokens, float32.

    Returns:
        ``S``, ``[P, H]``, and what the layer still lacks after it, ``[R, H]``; ``None`` if no length of it helps.
    """
    step_PH, size = _conjugate_gradient(expert, lacking_RH), lacking_RH.norm()
    for length in LENGTHS:
        left_RH = lacking_RH - expert.change(length * step_PH)
        if left_RH.norm() < size:
            return length * step_PH, left_RH
    return None


def _conjugate_gradient(expert: Linearised, lacking_RH: Tensor) -> Tensor:
    """Approximately ``argmin_S ||lacking - push(S)||``."""
    scale_PH = expert.curvature()
    remaining_PH = expert.pull(lacking_RH)
    step_PH = torch.zeros_like(remaining_PH)
    towards_PH = scaled_PH = remaining_PH / scale_PH
    size = (remaining_PH * scaled_PH).sum()
    for _ in range(ITERATIONS):
        pushed_RH = expert.push(towards_PH)
        bend = pushed_RH.square().sum()
        if not bend > 0:
            break
        step_PH = step_PH + size / bend * towards_PH
        remaining_PH = remaining_PH - size / bend * expert.pull(pushed_RH)
        scaled_PH = remaining_PH / scale_PH
        before, size = size, (remaining_PH * scaled_PH).sum()
        towards_PH = scaled_PH + size / before * towards_PH
    return step_PH
