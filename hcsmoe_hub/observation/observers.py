"""What the experts of a layer run through: the real routing, as it is or as a result has it, and what is seen of it.

E experts, T tokens of one micro-batch, H hidden size, I expert intermediate size, K experts per token.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hcsmoe_hub.machine.accelerator import is_host
from hcsmoe_hub.model.experts import Experts
from hcsmoe_hub.observation.visits import GroupedRun, grouped_matrices, sorted_choices, token_chunks

# A CPU matrix product in bf16 compiles a kernel for every new row count; few distinct counts keep it fast.
ROW_MULTIPLE = 64
# Tokens that an expert sees at once on a CPU, whose system would otherwise clear fresh memory for every result in
# between.
HOST_ROWS = 1024


def padded(token: Tensor) -> Tensor:
    """Token indices, the first one repeated up to a multiple of ``ROW_MULTIPLE`` on the host."""
    missing = -len(token) % ROW_MULTIPLE if is_host(token.device) else 0
    return torch.cat([token, token[:1].expand(missing)]) if missing else token


def hidden_of(experts: Experts, expert: int, tokens_TH: Tensor) -> Tensor:
    """Hidden activations ``[T, I]`` of one expert."""
    if not is_host(tokens_TH.device) or len(tokens_TH) <= HOST_ROWS:
        return experts.hidden(expert, tokens_TH)
    hidden_TI = None
    for start in range(0, len(tokens_TH), HOST_ROWS):
        part = slice(start, start + HOST_ROWS)
        found = experts.hidden(expert, tokens_TH[part])
        if hidden_TI is None:
            hidden_TI = found.new_empty(len(tokens_TH), found.shape[1])
        hidden_TI[part] = found
    assert hidden_TI is not None, "there are tokens"
    return hidden_TI


def _chosen(experts: Experts, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Indices of the chosen experts, -1 for none."""
    # An index beyond the experts, or a weight of exactly zero, is how routers say "no expert".
    is_routed = (weight_TK != 0) & (index_TK < experts.num_experts)
    return torch.where(is_routed, index_TK, -1).long()


def _as_it_is(values: Tensor) -> Tensor:
    return values


class RoutedObserver:
    """Runs the experts that the router chose, and remembers the choice and the result.

    Attributes:
        remembers: Whether anything is remembered; a layer that only runs has no use for it.
        keep: Takes what is remembered to where it is kept.
        top_k: One ``[T, K]`` int16 tensor per micro-batch; -1 where the router chose no expert.
        outputs: One ``[T, H]`` tensor per micro-batch: the router-weighted sum of expert outputs.
    """

    remembers = True

    def __init__(self) -> None:
        self.keep: Callable[[Tensor], Tensor] = _as_it_is
        self.top_k: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def __call__(self, experts: Experts, tokens_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        chosen_TK = _chosen(experts, index_TK, weight_TK)
        matrices = grouped_matrices(experts, tokens_TH)
        if matrices is None:
            output_TH = self._one_by_one(experts, tokens_TH, chosen_TK, weight_TK)
        else:
            output_TH = torch.empty_like(tokens_TH)
            for part in token_chunks(matrices, chosen_TK):
                # Nothing of a chunk is held while the next one runs.
                output_TH[part] = self._grouped(
                    GroupedRun(experts, matrices, tokens_TH[part], chosen_TK[part], weight_TK[part]),
                    experts,
                    tokens_TH[part],
                )
        if self.remembers:
            self.top_k.append(self.keep(chosen_TK.to(torch.int16)))
            self.outputs.append(self.keep(output_TH))
        return output_TH

    def _grouped(self, run: GroupedRun, experts: Experts, tokens_TH: Tensor) -> Tensor:
        """The output ``[T, H]`` of all experts that ran at once, float32."""
        return run.routed().sum(1)

    def _one_by_one(self, experts: Experts, tokens_TH: Tensor, chosen_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The output ``[T, H]`` of one expert after the other."""
        output_TH = torch.zeros(tokens_TH.shape, dtype=torch.float32, device=tokens_TH.device)
        for expert, (token, slot) in enumerate(sorted_choices(chosen_TK, experts.num_experts)):
            if len(token):
                weight_N1 = weight_TK[token, slot, None].float()
                routed_NH = self._routed(experts, expert, tokens_TH, token, weight_N1)
                self._on_routed(expert, token, slot, routed_NH, weight_N1)
                output_TH.index_add_(0, token, routed_NH)
            self._on_expert(experts, expert, tokens_TH, token)
        return output_TH.to(tokens_TH.dtype)

    def _on_routed(self, expert: int, token: Tensor, slot: Tensor, routed_NH: Tensor, weight_N1: Tensor) -> None:
        """Sees the router-weighted outputs of one expert, where they belong and what they were weighted with."""

    def _on_run(self, experts: Experts, expert: int, hidden_NI: Tensor, output_NH: Tensor) -> None:
        """Sees the hidden activations of one expert on the tokens routed to it, and its outputs before any weight."""

    def _on_expert(self, experts: Experts, expert: int, tokens_TH: Tensor, token: Tensor) -> None:
        """Called when the tokens routed to one expert, ``token``, are done with; may run it on more."""

    def _routed(self, experts: Experts, expert: int, tokens_TH: Tensor, token: Tensor, weight_N1: Tensor) -> Tensor:
        """Router-weighted outputs ``[N, H]``, float32, of one expert on the N tokens routed to it.

        They are computed in the same way whatever else is observed, so that a block which runs again on the same inputs
        returns the same bits.
        """
        if experts.scales_input:
            inputs = tokens_TH[token] * weight_N1.to(tokens_TH.dtype)
            return experts.project(expert, hidden_of(experts, expert, inputs)).float()
        hidden_NI = hidden_of(experts, expert, tokens_TH[padded(token)])
        output_NH = experts.project(expert, hidden_NI)
        self._on_run(experts, expert, hidden_NI[: len(token)], output_NH[: len(token)])
        return output_NH[: len(token)].float() * weight_N1


class TiedObserver(RoutedObserver):
    """Runs K experts under a router that still chooses from N: every choice leads to the expert of its cluster.

    Args:
        labels: Cluster of every source expert.
        clusters: K; a choice beyond the N experts becomes K, and thereby "no expert" again.
    """

    def __init__(self, labels: Sequence[int], clusters: int) -> None:
        super().__init__()
        self._labels = torch.tensor([*labels, clusters])

    def __call__(self, experts: Experts, tokens_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        labels = self._labels.to(index_TK.device)
        return super().__call__(experts, tokens_TH, labels[index_TK.clamp(max=len(labels) - 1)], weight_TK)


class SampleObserver(RoutedObserver):
    """Also remembers what the experts were given.

    Attributes:
        tokens: One ``[T, H]`` tensor per micro-batch, where the experts are.
        weights: One ``[T, K]`` tensor of router weights per micro-batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[Tensor] = []
        self.weights: list[Tensor] = []

    def __call__(self, experts: Experts, tokens_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        self.tokens.append(tokens_TH)
        self.weights.append(weight_TK)
        return super().__call__(experts, tokens_TH, index_TK, weight_TK)


class RouterObserver(RoutedObserver):
    """Runs no expert at all: remembers what the router decided, on the CPU.

    Attributes:
        weights: One ``[T, K]`` tensor of router weights per micro-batch.
        inputs: One ``[T, H]`` tensor per micro-batch of what the router's matrix was given, if it is watched.
        logits: One ``[T, E]`` tensor of its logits per micro-batch, if it is watched.
        extra: The same of its rows that belong to no expert, ``[T, X]``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.extra: list[Tensor] = []

    def __call__(self, experts: Experts, tokens_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        self.top_k.append(_chosen(experts, index_TK, weight_TK).to("cpu", torch.int16))
        self.weights.append(weight_TK.to("cpu"))
        return torch.zeros_like(tokens_TH)

    def on_router(self, inputs_TH: Tensor, logits_TE: Tensor, extra_TX: Tensor) -> None:
        """Sees what goes into and what comes out of the router's matrix."""
        for seen, values in ((self.inputs, inputs_TH), (self.logits, logits_TE), (self.extra, extra_TX)):
            seen.append(values.to("cpu"))


class InputObserver(RouterObserver):
    """Also remembers what the experts were given.

    Attributes:
        tokens: One ``[T, H]`` tensor per micro-batch, on the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[Tensor] = []

    def __call__(self, experts: Experts, tokens_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        self.tokens.append(tokens_TH.to("cpu"))
        return super().__call__(experts, tokens_TH, index_TK, weight_TK)


class SubsetObserver(RoutedObserver):
    """Adds up outputs that are known already, for a router that may choose from some of the experts only.

    Args:
        outputs_ETH: Outputs of all source experts on the tokens of one run.
        kept: The source experts that the router may choose from, in the order of its rows.
    """

    def __init__(self, outputs_ETH: Tensor, kept: Sequence[int]) -> None:
        super().__init__()
        self._outputs_ETH = outputs_ETH
        self._kept = torch.tensor([*kept, 0], device=outputs_ETH.device)

    def __call__(self, experts: Experts, tokens_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        is_routed_TK = (weight_TK != 0) & (index_TK < len(self._kept) - 1)
        expert_TK = self._kept[index_TK.clamp(max=len(self._kept) - 1)]
        token_T1 = torch.arange(len(tokens_TH), device=tokens_TH.device)[:, None]
        weight_TK1 = torch.where(is_routed_TK, weight_TK, 0)[..., None].float()
        output_TH = (self._outputs_ETH[expert_TK, token_T1] * weight_TK1).sum(1).to(tokens_TH.dtype)
        self.outputs.append(self.keep(output_TH))
        return output_TH
