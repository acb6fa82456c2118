"""Whole experts fitted to the original layer's output: input matrices by linearised, down projections by exact steps.

C experts, T tokens, R tokens routed to one expert, P pre-activations, I neurons of an expert, H hidden size.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from hcsmoe_hub.methods.refit.down_projections import RoutedNeurons, fit_down, routed_output, routed_tokens
from hcsmoe_hub.methods.refit.input_matrices import Linearised, fit_inputs

ROUNDS = 12
# Tokens that one round looks at for the input matrices; each round takes others.
STEP_TOKENS = 8192


class OpenExperts(Protocol):
    """Experts whose input matrices can be written to."""

    def inputs(self, expert: int) -> tuple[Tensor, ...]:
        """Views ``[P_i, H]`` float32 of the matrices that make the pre-activations, one after the other."""
        ...

    def pre_activation(self, expert: int, tokens_TH: Tensor) -> Tensor:
        """``[T, P]``."""
        ...

    def gate(self, pre_TP: Tensor) -> Tensor:
        """``[T, I]``, elementwise in the neurons."""
        ...


class OpenNeurons(RoutedNeurons, Protocol):
    """Tokens with their routing, and the experts behind them."""

    @property
    def experts(self) -> OpenExperts:
        """The experts."""
        ...

    def part(self, tokens: Tensor) -> "OpenNeurons":
        """The same for some of the tokens."""
        ...


def fit_experts(sample: OpenNeurons, wanted_TH: Tensor, down_CIH: Tensor, *, seed: int) -> Iterator[int]:
    """Alternates between the input matrices and the down projections of all experts of a layer, in place.

    ``min sum_t ||y_t - sum_k g_k(x_t) D_k^T phi(W_k x_t)||^2`` over W and D. In every round each W_k takes one
    Gauss-Newton step, whose problem is linear least squares, on a seeded sample of tokens; then all D are solved for on
    all tokens (``fit_down``). Nothing is back-propagated through the model.

    Args:
        sample: Tokens to fit, float32, with their routing.
        wanted_TH: ``y`` without the biases of the down projections, float32.
        down_CIH: ``D``, float32; written to.
        seed: Of the choice of tokens.

    Yields:
        The number of the round that has just been finished, from 1; to stop, take no more.
    """
    generator = torch.Generator().manual_seed(seed)
    for number in range(1, ROUNDS + 1):
        chosen = torch.randperm(len(wanted_TH), generator=generator)[:STEP_TOKENS].sort().values
        _step_inputs(sample.part(chosen), wanted_TH[chosen.to(wanted_TH.device)], down_CIH)
        down_CIH.copy_(fit_down(sample, wanted_TH, down_CIH, rounds=1))
        yield number


def _step_inputs(sample: OpenNeurons, wanted_TH: Tensor, down_CIH: Tensor) -> None:
    """One step for the input matrices of every expert in turn, each seeing what the ones before it did."""
    lacking_TH = wanted_TH - routed_output(sample, down_CIH)
    for expert, down_IH in enumerate(down_CIH):
        token_R, weight_R1 = routed_tokens(sample, expert)
        if not len(token_R):
            continue
        tokens_RH = sample.tokens_TH[token_R]
        linear = Linearised(
            inputs_RH=tokens_RH,
            pre_RP=sample.experts.pre_activation(expert, tokens_RH),
            weight_R1=weight_R1,
            down_IH=down_IH,
            gate=sample.experts.gate,
        )
        step = fit_inputs(linear, lacking_TH[token_R])
        if step is None:
            continue
        step_PH, lacking_TH[token_R] = step
        views = sample.experts.inputs(expert)
        for view, change in zip(views, step_PH.split([len(view) for view in views]), strict=True):
            view += change
