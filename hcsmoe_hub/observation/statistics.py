"""Streaming statistics of one layer's experts: independent of how the tokens were cut into micro-batches.

E experts, T tokens of one micro-batch, F feature size (hidden activation or output), H hidden size, K experts per
token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.machine import ranks
from hcsmoe_hub.machine.accelerator import HOST, is_host
from hcsmoe_hub.methods.totals import total
from hcsmoe_hub.observation.wanted import Wanted

DEFAULT_WANTED = Wanted()
# Tokens whose features are added up at once on the host.
WIDE_TOKENS = 256


@dataclass(slots=True)
class ExpertStatistics:
    """Sums over all calibration tokens seen so far, on the device where they are added up.

    Attributes:
        wanted: What is added up besides usage, routing scores and saliency.
        features_EF: Sum over all tokens of each expert's feature vector, float64.
        usage_E: How often the router chose each expert, int64.
        saliency_E: Sum over routed tokens of ``weight * ||E_i(x)||``, float64 (REAP's numerator).
        probability_E: Sum over all tokens of the softmax of the router logits, float64.
        logits_gram_EE: Sum over all tokens of the products of two experts' router logits, float64.
        mass_E: Sum over routed tokens of the router weight, float64.
        norm_E: Sum over routed tokens of ``||E_i(x)||``, float64; of ``||E_i(gx)||`` where the weight scales the input.
        gram_EE: Sum over the tokens routed to both of the products of two experts' router-weighted outputs, float64.
        tokens: Number of tokens seen.
    """

    wanted: Wanted
    features_EF: Tensor
    usage_E: Tensor
    saliency_E: Tensor
    probability_E: Tensor
    logits_gram_EE: Tensor
    mass_E: Tensor
    norm_E: Tensor
    gram_EE: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, experts: int, *, wanted: Wanted = DEFAULT_WANTED, device: torch.device = HOST) -> "ExpertStatistics":
        """Statistics before the first token; the feature size is known with the first features.

        Args:
            experts: E.
            wanted: What to add up.
            device: Where the experts run.
        """
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        return cls(
            wanted=wanted,
            features_EF=zeros(experts, 0),
            usage_E=zeros(experts, dtype=torch.int64),
            saliency_E=zeros(experts),
            probability_E=zeros(experts),
            logits_gram_EE=zeros(experts, experts),
            mass_E=zeros(experts),
            norm_E=zeros(experts),
            gram_EE=zeros(experts, experts),
        )

    def count(self, top_k_TK: Tensor) -> None:
        """Counts the router's choices of one micro-batch; -1 means that none was made."""
        self.tokens += len(top_k_TK)
        # Counting by index needs no answer from a device, as ``bincount`` does.
        place = (top_k_TK + 1).flatten().long()
        counts = torch.zeros(len(self.usage_E) + 1, dtype=torch.int64, device=place.device)
        self.usage_E += counts.scatter_add_(0, place, torch.ones_like(place))[1:]

    def add_features(self, expert: int, features_TF: Tensor) -> None:
        """Adds one expert's features of one micro-batch, in float64: how tokens were cut must not show in float32."""
        if self.features_EF.shape[1] == 0:
            shape = (len(self.usage_E), features_TF.shape[1])
            self.features_EF = torch.zeros(shape, dtype=torch.float64, device=features_TF.device)
        # A CPU makes a wide copy of what it adds up in another dtype.
        for part_TF in features_TF.split(WIDE_TOKENS) if is_host(features_TF.device) else (features_TF,):
            self.features_EF[expert] += part_TF.sum(0, dtype=torch.float64)

    def add_norms(self, expert: int, norm_N: Tensor) -> None:
        """Adds the norms of one expert's router-weighted outputs on the N tokens routed to it."""
        self.saliency_E[expert] += total(norm_N, dtype=torch.float64)

    def add_weights(self, expert: int, weight_N: Tensor, norm_N: Tensor) -> None:
        """Adds the router weights of the N tokens routed to one expert, and the norms of its outputs there."""
        self.mass_E[expert] += total(weight_N, dtype=torch.float64)
        self.norm_E[expert] += total(norm_N, dtype=torch.float64)

    def add_choices(self, chosen_TK: Tensor, weight_TK: Tensor, norm_TK: Tensor, own_norm_TK: Tensor) -> None:
        """Does for all experts at once what ``add_norms`` and ``add_weights`` do for one.

        Args:
            chosen_TK: Chosen experts; -1 for none.
            weight_TK: Router weights of the choices.
            norm_TK: Norms of the router-weighted outputs.
            own_norm_TK: Norms of the outputs.
        """
        pairs = [(self.saliency_E, norm_TK)]
        if self.wanted.sums:
            pairs += [(self.mass_E, weight_TK), (self.norm_E, own_norm_TK)]
        place_TK, is_chosen_TK = chosen_TK.clamp(min=0).long(), chosen_TK >= 0
        for sums_E, values_TK in pairs:
            wide_TK = torch.where(is_chosen_TK, values_TK, 0).double()
            # Token by token, so that the order of the summands is always the same.
            found_TE = wide_TK.new_zeros(len(wide_TK), len(sums_E)).scatter_add_(1, place_TK, wide_TK)
            sums_E += found_TE.sum(0)

    def add_products(self, chosen_TK: Tensor, routed_TKH: Tensor) -> None:
        """Adds the products of the router-weighted outputs that come together in a token.

        Args:
            chosen_TK: Experts that the router chose; -1 for none.
            routed_TKH: What each choice adds to the routed output, float32; 0 for no choice.
        """
        experts, index_TK = len(self.usage_E), chosen_TK.clamp(min=0).long()
        products_TKK = torch.bmm(routed_TKH, routed_TKH.mT).double()
        pair_TKK = (index_TK[:, :, None] * experts + index_TK[:, None, :]).flatten()
        if is_host(pair_TKK.device):
            self.gram_EE.view(-1).index_add_(0, pair_TKK, products_TKK.flatten())
        else:
            # Adds in the same order whenever it runs.
            self.gram_EE.view(-1).index_put_((pair_TKK,), products_TKK.flatten(), accumulate=True)

    def add_logits(self, logits_TE: Tensor) -> None:
        """Adds the raw router logits of one micro-batch, before any scoring function or bias."""
        wide_TE = logits_TE.double()
        if self.wanted.logits:
            self.logits_gram_EE += wide_TE.T @ wide_TE
        self.probability_E += wide_TE.softmax(dim=-1).sum(0)

    def finish(self) -> None:
        """Adds up what all processes have seen, each of which has run the model on its own sequences."""
        count = torch.tensor([self.tokens], device=self.usage_E.device)
        self.tokens = int(ranks.add_up(count)) if ranks.is_shared() else self.tokens
        for name in ("usage_E", "saliency_E", "probability_E", *self._wanted_sums()):
            ranks.add_up(getattr(self, name))

    def _wanted_sums(self) -> list[str]:
        wanted = self.wanted
        found = {
            "features_EF": wanted.outputs,
            "logits_gram_EE": wanted.logits,
            "mass_E": wanted.sums,
            "norm_E": wanted.sums,
            "gram_EE": wanted.products,
        }
        return [name for name, is_wanted in found.items() if is_wanted]

    def mean_features(self) -> Tensor:
        """Mean feature of every expert over all tokens, ``[E, F]`` float64."""
        return self.features_EF / self.tokens


@dataclass(frozen=True, slots=True)
class Call:
    """The inputs of one run of an MoE block, on its device or on the host."""

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
        logits_gram_EE: Products of two experts' router logits summed over all tokens, float64; ``None`` where nothing
            asked for it.
        sample: Inputs of the block for a sample of the tokens, as one sequence; ``None`` where nothing asked for it,
            or a block cannot be run on single tokens.
        mass_E: Sum over the tokens routed to an expert of its router weight, float64; this and what follows is ``None``
            also where nothing asked for it, and in files of earlier versions.
        norm_E: Mean over the tokens routed to an expert of ``||E_i(x)||``, float64; 0 where none was.
        gram_EE: Products ``sum_x <g_i E_i(x), g_j E_j(x)>`` of two experts' router-weighted outputs over the tokens
            routed to both, float64.
    """

    tokens: int
    usage_E: Tensor
    routing_score_E: Tensor
    saliency_E: Tensor
    outputs_EH: Tensor | None
    logits_gram_EE: Tensor | None
    sample: Call | None
    mass_E: Tensor | None = None
    norm_E: Tensor | None = None
    gram_EE: Tensor | None = None

    @classmethod
    def of(cls, sums: ExpertStatistics, outputs_EH: Tensor | None, sample: Call | None) -> "LayerStatistics":
        """The sums over all tokens, finished and brought to the host."""
        wanted = sums.wanted
        usage_E, logits_gram_EE, gram_EE = sums.usage_E.cpu(), sums.logits_gram_EE, sums.gram_EE
        # One copy instead of four.
        rows = torch.stack([sums.probability_E, sums.saliency_E, sums.mass_E, sums.norm_E]).cpu()
        probability_E, saliency_E, mass_E, norm_E = rows.unbind()
        return cls(
            tokens=sums.tokens,
            usage_E=usage_E,
            routing_score_E=probability_E / sums.tokens,
            saliency_E=saliency_E / usage_E.clamp(min=1),
            outputs_EH=outputs_EH,
            logits_gram_EE=logits_gram_EE.cpu() if wanted.logits else None,
            sample=sample,
            mass_E=mass_E.clone() if wanted.sums else None,
            norm_E=norm_E / usage_E.clamp(min=1) if wanted.sums else None,
            gram_EE=gram_EE.cpu() if wanted.products else None,
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
    own = count_tokens(calls)
    start, total = ranks.place(own, calls[0].args[0].device)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    chosen = order[:count].sort().values
    picked = pick_tokens(calls, between(chosen, start, own))
    return Call(tuple(map(_joined, picked.args)), {name: _joined(value) for name, value in picked.kwargs.items()})


def between(numbers: Tensor, start: int, count: int) -> Tensor:
    """Those of some ascending numbers that lie within ``count`` from ``start`` on, counted from there."""
    return numbers[(numbers >= start) & (numbers < start + count)] - start


def _joined(values: Tensor | None) -> Tensor | None:
    """Rows ``[1, T, ...]`` of all processes."""
    return None if values is None else ranks.joined(values[0])[None]


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


def halves(call: Call) -> list[Call]:
    """The inputs of a block that treats tokens alone, cut in two.

    Raises:
        PlanError: If they are of one token.
    """
    tokens = count_tokens([call])
    if tokens == 1:
        raise PlanError("one token does not fit into memory along with one decoder layer.", hint="use `device='cpu'`")
    return [pick_tokens([call], part) for part in torch.arange(tokens).chunk(2)]


def pick_tokens(calls: list[Call], chosen: Tensor) -> Call:
    """Some tokens of a block that treats tokens alone, as one sequence.

    Args:
        calls: One per micro-batch.
        chosen: Ascending token numbers over all calls, ``[count]`` int64, on the host.

    Returns:
        One call with inputs ``[1, count, ...]``, where those of the calls are.
    """

    def pick(values: list[Any]) -> Tensor | None:
        return None if values[0] is None else pick_rows([value.flatten(0, 1) for value in values], chosen)[None]

    first = calls[0]
    return Call(
        args=tuple(pick([call.args[number] for call in calls]) for number in range(len(first.args))),
        kwargs={name: pick([call.kwargs[name] for call in calls]) for name in first.kwargs},
    )


def pick_rows(parts: Sequence[Tensor], chosen: Tensor) -> Tensor:
    """Some rows of several tensors, one below the other; their ascending numbers over all of them are on the host."""
    inside, start = [], 0
    for rows in parts:
        inside.append(between(chosen, start, len(rows)))
        start += len(rows)
    # An accelerator is given the numbers of all parts at once: it is waited for with every copy.
    placed = torch.cat(inside).to(parts[0].device).split([len(numbers) for numbers in inside])
    return torch.cat([rows.index_select(0, numbers) for rows, numbers in zip(parts, placed, strict=True)])
