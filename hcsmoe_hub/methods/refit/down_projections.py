"""Down projections that make the reduced experts add up to what the original layer returned.

C experts, T tokens, R tokens routed to one expert, I neurons of an expert, H hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

DOWN_ROUNDS = 3
# Ridge strength as a share of the mean diagonal of an expert's Gram matrix.
RIDGE = 1e-2
CHUNK_TOKENS = 4096
# Cholesky factors and features are kept while all of a layer's fit into this, each, and computed again otherwise.
KEPT_BYTES = 1 << 30


class RoutedNeurons(Protocol):
    """What the neurons of merged experts do on tokens, under the router that they will have."""

    @property
    def tokens_TH(self) -> Tensor:
        """What goes into the experts."""
        ...

    @property
    def index_TK(self) -> Tensor:
        """Experts that the router chose; -1 for none."""
        ...

    @property
    def weight_TK(self) -> Tensor:
        """Router weights of the choices."""
        ...

    def hidden(self, expert: int, inputs_RH: Tensor) -> Tensor:
        """Hidden activation of one expert on some inputs: ``[R, I]`` float32."""
        ...


def routed_tokens(sample: RoutedNeurons, expert: int) -> tuple[Tensor, Tensor]:
    """Tokens routed to an expert, each once: numbers ``[R]`` ascending, and router weights ``[R, 1]`` float32.

    A token table may send two choices of a token to one merged expert; their weights add up.
    """
    is_chosen_TK = sample.index_TK == expert
    (token_R,) = torch.where(is_chosen_TK.any(1))
    weight_RK = torch.where(is_chosen_TK[token_R], sample.weight_TK[token_R].float(), 0.0)
    return token_R, weight_RK.sum(1, keepdim=True)


@dataclass(frozen=True, slots=True, eq=False)
class _Features:
    """Router-weighted hidden activations of one expert on the tokens that are routed to it, chunk by chunk.

    They are kept from pass to pass while all of a layer's fit into ``KEPT_BYTES``, and computed again otherwise.
    """

    sample: RoutedNeurons
    expert: int
    token_R: Tensor
    weight_R1: Tensor
    is_kept: bool
    kept: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, sample: RoutedNeurons, expert: int, *, is_kept: bool = False) -> "_Features":
        return cls(sample, expert, *routed_tokens(sample, expert), is_kept, [])

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Token numbers ``[r]`` and features ``[r, I]`` float32."""
        if self.kept:
            yield from self.kept
            return
        for token, weight in zip(self.token_R.split(CHUNK_TOKENS), self.weight_R1.split(CHUNK_TOKENS), strict=True):
            chunk = token, self.sample.hidden(self.expert, self.sample.tokens_TH[token]) * weight
            if self.is_kept:
                self.kept.append(chunk)
            yield chunk


def fit_down(sample: RoutedNeurons, wanted_TH: Tensor, down_CIH: Tensor, *, rounds: int = DOWN_ROUNDS) -> Tensor:
    """Ridge least squares over the down projections of all experts of a layer.

    ``min sum_t ||y_t - sum_k g_k(x_t) D_k^T a_k(x_t)||^2 + sum_k l_k ||D_k - D_k0||^2``, where y is the routed output
    of the original layer, g and a are router weights and hidden activations of the merged experts, and D_0 their down
    projections so far. Convex; solved expert by expert (block-coordinate descent) in a few rounds, each expert
    exactly by a Cholesky factor of its Gram matrix in float64. ``l_k`` is ``RIDGE`` times the mean diagonal of that
    matrix, so that an expert which few tokens reach stays what it was.

    Args:
        sample: Inputs, choices and weights of the merged experts on the tokens to fit.
        wanted_TH: ``y`` without the biases of the down projections, float32; not changed.
        down_CIH: ``D_0``, any float dtype.
        rounds: How often every expert is solved for.

    Returns:
        The fitted projections, ``[C, I, H]`` float32.
    """
    residual_TH, fitted_CIH = wanted_TH.clone(), down_CIH.float().clone()
    neurons = down_CIH.shape[1]
    keeps_features = sample.index_TK.numel() * neurons * 4 <= KEPT_BYTES
    features = [_Features.of(sample, expert, is_kept=keeps_features) for expert in range(len(down_CIH))]
    keeps_factors = len(features) * neurons * neurons * 8 <= KEPT_BYTES
    factors: dict[int, tuple[float, Tensor]] = {}
    for known, down_IH in zip(features, fitted_CIH, strict=True):
        for token, values in known.chunks():
            residual_TH.index_add_(0, token, values @ down_IH, alpha=-1)
    for _ in range(rounds):
        for expert, known in enumerate(features):
            ridge, factor_II = factors.get(expert) or _factor(known, neurons)
            if ridge == 0:
                continue
            if keeps_factors:
                factors[expert] = ridge, factor_II
            pull_IH = ridge * (down_CIH[expert].float() - fitted_CIH[expert]).double()
            step_IH = torch.cholesky_solve(_products(known, residual_TH, pull_IH), factor_II).float()
            fitted_CIH[expert] += step_IH
            for token, values in known.chunks():
                residual_TH.index_add_(0, token, values @ step_IH, alpha=-1)
    return fitted_CIH


def _factor(known: _Features, neurons: int) -> tuple[float, Tensor]:
    """Ridge strength of one expert, and the Cholesky factor ``[I, I]`` of its Gram matrix with it; 0 without tokens."""
    gram_II = torch.zeros(neurons, neurons, dtype=torch.float64, device=known.weight_R1.device)
    for _, values in known.chunks():
        gram_II += values.T @ values
    ridge = RIDGE * float(gram_II.diagonal().mean())
    if ridge == 0:
        return 0.0, gram_II
    gram_II.diagonal().add_(ridge)
    return ridge, torch.linalg.cholesky(gram_II)


def _products(known: _Features, residual_TH: Tensor, start_IH: Tensor) -> Tensor:
    """Products of one expert's features with the residual, ``[I, H]`` float64, added to ``start_IH``."""
    for token, values in known.chunks():
        start_IH += values.T @ residual_TH[token]
    return start_IH


def routed_output(sample: RoutedNeurons, down_CIH: Tensor) -> Tensor:
    """What the experts add up to without biases of their own: ``sum_k g_k(x) D_k^T a_k(x)``, ``[T, H]`` float32."""
    output_TH = torch.zeros(len(sample.tokens_TH), down_CIH.shape[2], device=down_CIH.device)
    for expert in range(len(down_CIH)):
        for token, values in _Features.of(sample, expert).chunks():
            output_TH.index_add_(0, token, values @ down_CIH[expert].float())
    return output_TH
