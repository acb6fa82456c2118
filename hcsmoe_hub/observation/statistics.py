"""Streaming statistics of one layer's experts: independent of how the tokens were cut into micro-batches.

E experts, T tokens of one micro-batch, F feature size (hidden activation or output), H hidden size, K experts per
token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class ExpertStatistics:
    """Sums over all calibration tokens seen so far.

    Attributes:
        features_EF: Sum over all tokens of each expert's feature vector, float64, on the device of the features.
        usage_E: How often the router chose each expert, int64.
        saliency_E: Sum over routed tokens of ``weight * ||E_i(x)||``, float64 (REAP's numerator).
        probability_E: Sum over all tokens of the softmax of the router logits, float64.
        logits_gram_EE: Sum over all tokens of the products of two experts' router logits, float64.
        mass_E: Sum over routed tokens of the router weight, float64.
        norm_E: Sum over routed tokens of ``||E_i(x)||``, float64; of ``||E_i(gx)||`` where the weight scales the input.
        gram_EE: Sum over the tokens routed to both of the products of two experts' router-weighted outputs, float64;
            ``None`` where it is not accumulated.
        tokens: Number of tokens seen.
    """

    features_EF: Tensor
    usage_E: Tensor
    saliency_E: Tensor
    probability_E: Tensor
    logits_gram_EE: Tensor
    mass_E: Tensor
    norm_E: Tensor
    gram_EE: Tensor | None
    tokens: int = 0

    @classmethod
    def empty(cls, experts: int, *, with_gram: bool = False) -> "ExpertStatistics":
        """Statistics before the first token; the feature size is known with the first features.

        Args:
            experts: E.
            with_gram: Whether to accumulate ``gram_EE``.
        """
        return cls(
            features_EF=torch.zeros(experts, 0, dtype=torch.float64),
            usage_E=torch.zeros(experts, dtype=torch.int64),
            saliency_E=torch.zeros(experts, dtype=torch.float64),
            probability_E=torch.zeros(experts, dtype=torch.float64),
            logits_gram_EE=torch.zeros(experts, experts, dtype=torch.float64),
            mass_E=torch.zeros(experts, dtype=torch.float64),
            norm_E=torch.zeros(experts, dtype=torch.float64),
            gram_EE=torch.zeros(experts, experts, dtype=torch.float64) if with_gram else None,
        )

    def count(self, top_k_TK: Tensor) -> None:
        """Counts the router's choices of one micro-batch; -1 means that none was made."""
        self.tokens += len(top_k_TK)
        chosen = top_k_TK[top_k_TK >= 0].long()
        self.usage_E += torch.bincount(chosen, minlength=len(self.usage_E))

    def add_features(self, expert: int, features_TF: Tensor) -> None:
        """Adds one expert's features of one micro-batch, summed in float32 and accumulated in float64."""
        if self.features_EF.shape[1] == 0:
            shape = (len(self.usage_E), features_TF.shape[1])
            self.features_EF = torch.zeros(shape, dtype=torch.float64, device=features_TF.device)
        self.features_EF[expert] += features_TF.sum(0, dtype=torch.float32)

    def add_saliency(self, expert: int, routed_NH: Tensor) -> None:
        """Adds the norms of one expert's router-weighted outputs ``[N, H]``."""
        self.saliency_E[expert] += routed_NH.norm(dim=-1).sum(dtype=torch.float64).cpu()

    def add_weights(self, expert: int, weight_N: Tensor, norm_N: Tensor) -> None:
        """Adds the router weights of the N tokens routed to one expert, and the norms of its outputs there."""
        self.mass_E[expert] += weight_N.sum(dtype=torch.float64).cpu()
        self.norm_E[expert] += norm_N.sum(dtype=torch.float64).cpu()

    def add_products(self, chosen_TK: Tensor, routed_TKH: Tensor) -> None:
        """Adds the products of the router-weighted outputs that come together in a token.

        Args:
            chosen_TK: Experts that the router chose; -1 for none.
            routed_TKH: What each choice adds to the routed output, float32; 0 for no choice.
        """
        assert self.gram_EE is not None, "these statistics were begun with a Gram matrix"
        experts, index_TK = len(self.usage_E), chosen_TK.clamp(min=0).long().cpu()
        products_TKK = torch.bmm(routed_TKH, routed_TKH.mT).double().cpu()
        pair_TKK = index_TK[:, :, None] * experts + index_TK[:, None, :]
        self.gram_EE.view(-1).index_add_(0, pair_TKK.flatten(), products_TKK.flatten())

    def add_logits(self, logits_TE: Tensor) -> None:
        """Adds the raw router logits of one micro-batch, before any scoring function or bias."""
        wide_TE = logits_TE.double()
        self.logits_gram_EE += (wide_TE.T @ wide_TE).cpu()
        self.probability_E += wide_TE.softmax(dim=-1).sum(0).cpu()

    def mean_features(self) -> Tensor:
        """Mean feature of every expert over all tokens, ``[E, F]`` float64."""
        return self.features_EF / self.tokens


@dataclass(frozen=True, slots=True)
class Call:
    """The inputs of one run of an MoE block, all on the CPU."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStatistics:
    """What is kept of one MoE layer once the model has run: enough for every method and every K.

    Attributes:
        tokens: Number of calibration tokens.
        usage_E: How often the router chose each expert, int64.
        routing_score_E: Mean over all tokens of the softmax of the router logits, float64 (S-prune's score).
        saliency_E: Mean over the tokens routed to an expert of ``weight * ||E_i(x)||``, float64; 0 where none was.
        outputs_EH: Mean output of every expert over all tokens, float32 (HC-SMoE, eq. 4); ``None`` where nothing asked
            for it.
        logits_gram_EE: Products of two experts' router logits summed over all tokens, float64.
        sample: Inputs of the block for a sample of the tokens, as one sequence; ``None`` where a block cannot be run on
            single tokens.
        mass_E: Sum over the tokens routed to an expert of its router weight, float64; this and what follows is ``None``
            in files of earlier versions.
        norm_E: Mean over the tokens routed to an expert of ``||E_i(x)||``, float64; 0 where none was.
        gram_EE: Products ``sum_x <g_i E_i(x), g_j E_j(x)>`` of two experts' router-weighted outputs over the tokens
            routed to both, float64; ``None`` also where nothing asked for it.
    """

    tokens: int
    usage_E: Tensor
    routing_score_E: Tensor
    saliency_E: Tensor
    outputs_EH: Tensor | None
    logits_gram_EE: Tensor
    sample: Call | None
    mass_E: Tensor | None = None
    norm_E: Tensor | None = None
    gram_EE: Tensor | None = None

    @classmethod
    def of(cls, sums: ExpertStatistics, outputs_EH: Tensor | None, sample: Call | None) -> "LayerStatistics":
        """Finishes the sums over all tokens."""
        return cls(
            tokens=sums.tokens,
            usage_E=sums.usage_E,
            routing_score_E=sums.probability_E / sums.tokens,
            saliency_E=sums.saliency_E / sums.usage_E.clamp(min=1),
            outputs_EH=outputs_EH,
            logits_gram_EE=sums.logits_gram_EE,
            sample=sample,
            mass_E=sums.mass_E,
            norm_E=sums.norm_E / sums.usage_E.clamp(min=1),
            gram_EE=sums.gram_EE,
        )


def sample_tokens(calls: list[Call], count: int, seed: int) -> Call | None:
    """A seeded sample of the tokens that a block was given, in their order, as one sequence.

    Args:
        calls: One per micro-batch; every input is a tensor ``[B, S, ...]`` or ``None`` for a block that treats tokens
            alone.
        count: Number of tokens, or all there are.
        seed: Of the choice.

    Returns:
        One call with inputs ``[1, count, ...]``; ``None`` if the block takes anything else than tokens.
    """
    if not takes_tokens(calls[0]):
        return None
    total = count_tokens(calls)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return pick_tokens(calls, order[:count].sort().values)


def spaced(tokens: Tensor, most: int) -> Tensor:
    """At most so many of some tokens, at even distances."""
    return tokens[torch.linspace(0, len(tokens) - 1, min(len(tokens), most)).long()]


def takes_tokens(call: Call) -> bool:
    """Whether a block treats tokens alone: every input of it is a tensor ``[B, S, ...]`` or ``None``."""
    inputs = [value for value in (*call.args, *call.kwargs.values()) if value is not None]
    return all(isinstance(value, Tensor) and value.shape[:2] == inputs[0].shape[:2] for value in inputs)


def count_tokens(calls: list[Call]) -> int:
    """Tokens of all calls of a block that treats tokens alone."""
    return sum(call.args[0].shape[0] * call.args[0].shape[1] for call in calls)


def pick_tokens(calls: list[Call], chosen: Tensor) -> Call:
    """Some tokens of a block that treats tokens alone, as one sequence.

    Args:
        calls: One per micro-batch.
        chosen: Ascending token numbers over all calls, ``[count]`` int64.

    Returns:
        One call with inputs ``[1, count, ...]``.
    """

    def pick(values: list[Any]) -> Tensor | None:
        if values[0] is None:
            return None
        parts, start = [], 0
        for value in values:
            tokens = value.flatten(0, 1)
            inside = chosen[(chosen >= start) & (chosen < start + len(tokens))]
            parts.append(tokens[inside - start])
            start += len(tokens)
        return torch.cat(parts)[None]

    first = calls[0]
    return Call(
        args=tuple(pick([call.args[number] for call in calls]) for number in range(len(first.args))),
        kwargs={name: pick([call.kwargs[name] for call in calls]) for name in first.kwargs},
    )
