"""Down projections that make the reduced experts add up to what the original layer returned.

C experts, T tokens, R tokens routed to one expert, I neurons of an expert, H hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from hcsmoe_hub.machine import ranks
from hcsmoe_hub.machine.precision import exact_products
from hcsmoe_hub.machine.smaller_pieces import and_host, first_that_fits, give_back

DOWN_ROUNDS = 3
# Ridge strength as a share of the mean diagonal of an expert's Gram matrix.
RIDGE = 1e-2
# Tokens whose features are in memory at once, and the fewest where memory runs out.
CHUNK_TOKENS = 4096
LEAST_TOKENS = 32
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


def routed_tokens(sample: RoutedNeurons, experts: int) -> list[tuple[Tensor, Tensor]]:
    """Tokens routed to each expert, each once: numbers ``[R]`` ascending, and router weights ``[R, 1]`` float32.

    A token table may send two choices of a token to one merged expert; their weights add up.

    Args:
        sample: Where tokens go.
        experts: C.
    """
    is_chosen_CT = sample.index_TK.new_zeros((experts + 1, len(sample.index_TK)), dtype=torch.bool)
    # The first row stands for no expert.
    is_chosen_CT.scatter_(0, sample.index_TK.T.long() + 1, True)
    expert_R, token_R = is_chosen_CT[1:].nonzero(as_tuple=True)
    is_own_RK = sample.index_TK[token_R] == expert_R[:, None]
    weight_R1 = torch.where(is_own_RK, sample.weight_TK[token_R].float(), 0.0).sum(1, keepdim=True)
    counts = is_chosen_CT[1:].sum(1).tolist()
    return list(zip(token_R.split(counts), weight_R1.split(counts), strict=True))


@dataclass(slots=True, kw_only=True, eq=False)
class _Room:
    """What is kept in memory from pass to pass, and how many tokens are processed at once.

    Attributes:
        keeps_features: Whether features are kept.
        keeps_factors: Whether Cholesky factors are.
        tokens: Tokens whose features are in memory at once.
        features: What is kept of them, by expert: token numbers ``[r]`` and features ``[r, I]`` float32 of every chunk.
        factors: Ridge strengths and factors that are kept, by expert.
    """

    keeps_features: bool = False
    keeps_factors: bool = False
    tokens: int = 0
    features: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    factors: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def give_up(self, error: Exception, device: torch.device) -> None:
        """Makes do with less after memory has run out: nothing is kept, or half as many tokens are looked at.

        Raises:
            Exception: The error, if it is about something else or nothing is left to give up.
        """
        give_back(error, device)
        if self.keeps_features or self.keeps_factors:
            self.keeps_features = self.keeps_factors = False
            self.features.clear()
            self.factors.clear()
        elif self.tokens > LEAST_TOKENS:
            self.tokens //= 2
        else:
            raise error


@dataclass(frozen=True, slots=True, eq=False)
class _Features:
    """Router-weighted hidden activations of one expert on the tokens that are routed to it, chunk by chunk.

    They are kept from pass to pass if the room says so, and computed again otherwise.
    """

    sample: RoutedNeurons
    expert: int
    token_R: Tensor
    weight_R1: Tensor
    room: _Room

    def each(self, use: Callable[[Tensor, Tensor], None]) -> None:
        """Gives all chunks to a function, smaller ones from where memory runs out.

        Args:
            use: Takes token numbers ``[r]`` and features ``[r, I]`` float32; leaves nothing changed if memory runs out.
        """
        start, room, kept = 0, self.room, list(self.room.features.get(self.expert, ()))
        while start < len(self.token_R):
            try:
                chunk = kept.pop(0) if kept else self._chunk(start)
                use(*chunk)
            except (RuntimeError, MemoryError) as error:
                kept.clear()
                room.give_up(error, self.weight_R1.device)
                continue
            start += len(chunk[0])

    def _chunk(self, start: int) -> tuple[Tensor, Tensor]:
        part = slice(start, start + self.room.tokens)
        token_r = self.token_R[part]
        values_rI = self.sample.hidden(self.expert, self.sample.tokens_TH[token_r].float()) * self.weight_R1[part]
        if self.room.keeps_features:
            self.room.features.setdefault(self.expert, []).append((token_r, values_rI))
        return token_r, values_rI


def _features(sample: RoutedNeurons, experts: int, room: _Room) -> list[_Features]:
    """Those of all experts."""
    routed = routed_tokens(sample, experts)
    return [_Features(sample, expert, *tokens, room) for expert, tokens in enumerate(routed)]


def fit_down(
    sample: RoutedNeurons,
    wanted_TH: Tensor,
    down_CIH: Tensor,
    *,
    rounds: int = DOWN_ROUNDS,
    kept_bytes: int | None = None,
) -> Tensor:
    """Ridge least squares over the down projections of all experts of a layer.

    ``min sum_t ||y_t - sum_k g_k(x_t) D_k^T a_k(x_t)||^2 + sum_k l_k ||D_k - D_k0||^2``, where y is the routed output
    of the original layer, g and a are router weights and hidden activations of the merged experts, and D_0 their down
    projections so far. Convex; solved expert by expert (block-coordinate descent) in a few rounds, each expert
    exactly by a Cholesky factor of its Gram matrix in float64. ``l_k`` is ``RIDGE`` times the mean diagonal of that
    matrix, so that an expert which few tokens reach stays what it was. Ranks add up their sums over tokens, and all
    solve the same equations. Where memory runs out, less is kept and fewer tokens are processed at once.

    Args:
        sample: Inputs, choices and weights of the merged experts on the tokens to fit.
        wanted_TH: ``y`` without the biases of the down projections, float32; not changed.
        down_CIH: ``D_0``, any float dtype.
        rounds: How often every expert is solved for.
        kept_bytes: Memory for features that are kept from round to round, and as much again for Cholesky factors;
            ``KEPT_BYTES`` by default.

    Returns:
        The fitted projections, ``[C, I, H]`` float32.
    """
    residual_TH, fitted_CIH = wanted_TH.clone(), down_CIH.float().clone()
    experts, neurons, most = len(down_CIH), down_CIH.shape[1], KEPT_BYTES if kept_bytes is None else kept_bytes
    room = _Room(
        keeps_features=sample.index_TK.numel() * neurons * 4 <= most,
        keeps_factors=experts * neurons * neurons * 8 <= most,
        tokens=CHUNK_TOKENS,
    )
    features = _features(sample, experts, room)
    for known, down_IH in zip(features, fitted_CIH, strict=True):
        _subtract(known, down_IH, residual_TH)
    for _ in range(rounds):
        for known, start_IH, fitted_IH in zip(features, down_CIH, fitted_CIH, strict=True):
            if not len(known.token_R) and not ranks.is_shared():
                continue
            ridge, factor_II = _factor(known, neurons)
            pull_IH = ridge * (start_IH.float() - fitted_IH).double()
            step_IH = _solve(_products(known, residual_TH, pull_IH), factor_II)
            fitted_IH += step_IH
            _subtract(known, step_IH, residual_TH)
    return fitted_CIH


def _subtract(known: _Features, down_IH: Tensor, residual_TH: Tensor) -> None:
    """Takes what one expert adds to the output from the residual."""

    def use(token_r: Tensor, values_rI: Tensor) -> None:
        residual_TH.index_add_(0, token_r, values_rI @ down_IH, alpha=-1)

    known.each(use)


def _factor(known: _Features, neurons: int) -> tuple[Tensor, Tensor]:
    """Ridge strength of one expert, and the Cholesky factor ``[I, I]`` of its Gram matrix with it.

    Without tokens the strength is 0, and the factor that of the unit matrix.
    """
    room, device = known.room, known.weight_R1.device
    # Computing one takes all ranks, and memory may have run out on some of them only.
    if ranks.all_agree(known.expert in room.factors):
        return room.factors[known.expert]

    def attempt(place: torch.device) -> Tensor:
        # Without the check, which would wait for the device: a fit that went wrong shows on held-out tokens.
        return torch.linalg.cholesky_ex(gram_II.to(place)).L

    gram_II = _gram(known, neurons)
    ridge = RIDGE * gram_II.diagonal().mean()
    gram_II.diagonal().add_(torch.where(ridge > 0, ridge, 1))
    found = ridge, first_that_fits(attempt, and_host(device), device)
    if room.keeps_factors:
        room.factors[known.expert] = found
    return found


def _gram(known: _Features, neurons: int) -> Tensor:
    """Sum of the products of one expert's features with each other, over all ranks: ``[I, I]`` float64."""
    device = known.weight_R1.device
    gram_II = torch.zeros(neurons, neurons, dtype=torch.float64, device=device)

    def use(_token_r: Tensor, values_rI: Tensor) -> None:
        with exact_products(device):
            gram_II.add_(values_rI.T @ values_rI)

    known.each(use)
    return ranks.add_up(gram_II)


def _products(known: _Features, residual_TH: Tensor, start_IH: Tensor) -> Tensor:
    """Products of one expert's features with the residual over all ranks, ``[I, H]`` float64, plus ``start_IH``."""
    sums_IH = torch.zeros_like(start_IH) if ranks.is_shared() else start_IH

    def use(token_r: Tensor, values_rI: Tensor) -> None:
        with exact_products(start_IH.device):
            sums_IH.add_(values_rI.T @ residual_TH[token_r])

    known.each(use)
    return sums_IH if sums_IH is start_IH else ranks.add_up(sums_IH).add_(start_IH)


def _solve(sums_IH: Tensor, factor_II: Tensor) -> Tensor:
    """The solution ``[I, H]`` of one expert's equations, float32; computed where the factor is if memory runs out."""
    device = sums_IH.device

    def attempt(place: torch.device) -> Tensor:
        return torch.cholesky_solve(sums_IH.to(place), factor_II.to(place)).float().to(device)

    places: Sequence[torch.device] = [factor_II.device] if factor_II.device != device else and_host(device)
    return first_that_fits(attempt, places, device)


def routed_output(sample: RoutedNeurons, down_CIH: Tensor) -> Tensor:
    """What the experts add up to without biases of their own: ``sum_k g_k(x) D_k^T a_k(x)``, ``[T, H]`` float32."""
    output_TH = torch.zeros(len(sample.tokens_TH), down_CIH.shape[2], device=down_CIH.device)
    for known, down_IH in zip(_features(sample, len(down_CIH), _Room(tokens=CHUNK_TOKENS)), down_CIH, strict=True):
        _add(known, down_IH, output_TH)
    return output_TH


def _add(known: _Features, down_IH: Tensor, output_TH: Tensor) -> None:
    """Adds what one expert returns to the output."""

    def use(token_r: Tensor, values_rI: Tensor) -> None:
        output_TH.index_add_(0, token_r, values_rI @ down_IH.float())

    known.each(use)
