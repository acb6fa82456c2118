"""The choices of a router for the tokens of one micro-batch, and the products of all experts with them.

E experts, T tokens, K experts per token, R choices sorted by expert, H hidden size, F feature size (hidden activation
or output).
"""

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from hcsmoe_hub.machine.accelerator import is_host
from hcsmoe_hub.methods.refit.grouped import ExpertMatrices, Visits
from hcsmoe_hub.model.experts import Experts

# Grouped products of an accelerator take rows of whole 16 bytes.
ROW_BYTES = 16
# Numbers of the size of an activation that the choices of a chunk of tokens take while they run: 1 GiB in 16 bits, with
# which experts of every size still get hundreds of rows each.
CHUNK_ELEMENTS = 1 << 29


def sorted_choices(chosen_TK: Tensor, experts: int) -> list[tuple[Tensor, Tensor]]:
    """Tokens of every expert and the places of the choices among the K, in the order of the tokens.

    One sort and one list of counts serve all experts, as an accelerator is waited for once for each.

    Args:
        chosen_TK: Chosen experts; -1 for none.
        experts: E.
    """
    choice_R, place_R = chosen_TK.flatten().sort(stable=True)
    numbers = torch.arange(experts, device=choice_R.device, dtype=choice_R.dtype)
    begins = torch.searchsorted(choice_R, torch.cat([numbers, numbers[-1:] + 1])).tolist()
    token_R, slot_R = place_R // chosen_TK.shape[1], place_R % chosen_TK.shape[1]
    parts = [slice(*pair) for pair in pairwise(begins)]
    return [(token_R[part], slot_R[part]) for part in parts]


def grouped_matrices(experts: Experts, tokens_TH: Tensor) -> ExpertMatrices | None:
    """The matrices of all experts, where the device of some tokens multiplies them at once; otherwise ``None``."""
    if is_host(tokens_TH.device):
        return None
    rows = dict(experts.module.named_parameters())
    for values in rows.values():
        # Elsewhere, in another dtype, or not expert by expert: one expert after the other.
        is_fitting = values.device == tokens_TH.device and values.dtype == tokens_TH.dtype
        if not is_fitting or values.shape[0] != experts.num_experts:
            return None
    found = experts.matrices(rows)
    widths = {side for values in (*found.incoming, found.outgoing) for side in values.shape[1:]}
    return found if all(width * tokens_TH.itemsize % ROW_BYTES == 0 for width in widths) else None


def choice_elements(hidden_size: int, neurons: int, pre_activations: int) -> int:
    """Numbers of the size of an activation that a choice takes at most while all experts run at once.

    First its input and its pre-activations, once more while gate and up are put next to each other; then its hidden
    activations and its output, in the order of the experts, in that of the tokens, and in float32.

    Args:
        hidden_size: H.
        neurons: I.
        pre_activations: P, twice the neurons where experts have gates.
    """
    return max(hidden_size + 2 * pre_activations, neurons + 4 * hidden_size)


def token_chunks(matrices: ExpertMatrices, chosen_TK: Tensor) -> Iterator[slice]:
    """Tokens that run through all experts at once: as many as take a bounded amount of memory."""
    tokens, top_k = chosen_TK.shape
    neurons, hidden_size = matrices.outgoing.shape[1:]
    pre_activations = sum(values.shape[2] for values in matrices.incoming)
    size = max(1, CHUNK_ELEMENTS // (top_k * choice_elements(hidden_size, neurons, pre_activations)))
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


class GroupedRun:
    """All experts on the tokens that are routed to them, as products of an accelerator that do not wait for it.

    Args:
        experts: How they compute.
        matrices: Their matrices.
        tokens_TH: Inputs of the block's experts.
        chosen_TK: Chosen experts; -1 for none.
        weight_TK: Router weights of the choices.

    Attributes:
        chosen_TK: Chosen experts; -1 for none.
        weight_TK: Router weights, float32.
        hidden_RI: Hidden activations of every choice.
        output_RH: Outputs before any router weight on them.
    """

    def __init__(
        self, experts: Experts, matrices: ExpertMatrices, tokens_TH: Tensor, chosen_TK: Tensor, weight_TK: Tensor
    ) -> None:
        self._experts = experts
        self.chosen_TK = chosen_TK
        self.weight_TK = weight_TK.float()
        self._visits = visits = Visits.on_device(chosen_TK, experts.num_experts)
        self.hidden_RI = experts.gate(self._pre_activations(tokens_TH, matrices))
        output_RH = self._plus(visits.product(self.hidden_RI, matrices.outgoing), matrices.outgoing_bias)
        self.output_RH = experts.finish(output_RH)

    def _pre_activations(self, tokens_TH: Tensor, matrices: ExpertMatrices) -> Tensor:
        visits = self._visits
        rows_RH = tokens_TH.index_select(0, visits.token_R)
        if self._experts.scales_input:
            rows_RH *= self.weight_TK.to(tokens_TH.dtype).flatten().index_select(0, visits.visit_R)[:, None]
        parts = [visits.product(rows_RH, matrix) for matrix in matrices.incoming]
        return self._plus(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), matrices.incoming_bias)

    def _plus(self, values_RX: Tensor, bias_EX: Tensor | None) -> Tensor:
        """Products, which are changed, and what is added to those of each expert."""
        return values_RX if bias_EX is None else values_RX.add_(bias_EX.index_select(0, self._visits.expert_R))

    def routed(self) -> Tensor:
        """What every choice adds to the output, ``[T, K, H]`` float32; 0 for no choice."""
        row_R = torch.empty_like(self._visits.visit_R)
        row_R[self._visits.visit_R] = torch.arange(len(row_R), device=row_R.device)
        shape = *self.chosen_TK.shape, self.output_RH.shape[1]
        routed_TKH = self.output_RH.index_select(0, row_R).view(shape).float()
        if not self._experts.scales_input:
            routed_TKH *= self.weight_TK[..., None]
        # A choice of no expert stands among those of the last one, whatever that returns.
        return routed_TKH.masked_fill_(self.chosen_TK[..., None] < 0, 0)

    @cached_property
    def is_chosen_TE(self) -> Tensor:
        """Which experts every token is routed to."""
        shape = len(self.chosen_TK), self._experts.num_experts + 1
        found_TE = torch.zeros(shape, dtype=torch.bool, device=self.chosen_TK.device)
        return found_TE.scatter_(1, self.chosen_TK + 1, True)[:, 1:]

    def features(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of every expert, its features ``[R, F]`` on the tokens that it is routed, and all other tokens.

        Waits once, for the numbers of both.
        """
        features_RF = self.hidden_RI if self._experts.is_affine else self.output_RH
        is_none_R = self.chosen_TK.flatten().index_select(0, self._visits.visit_R) < 0
        assert self._visits.ends_C is not None, "these visits were sorted on a device"
        numbers = torch.stack([self._visits.ends_C.long(), self.is_chosen_TE.sum(0)]).tolist()
        start, tokens = 0, len(self.is_chosen_TE)
        for expert, (end, count) in enumerate(zip(*numbers, strict=True)):
            own_RF = features_RF[start:end]
            if expert == self._experts.num_experts - 1:
                own_RF = own_RF.masked_fill(is_none_R[start:end, None], 0)
            yield own_RF, torch.nonzero_static(~self.is_chosen_TE[:, expert], size=tokens - count)[:, 0]
            start = end
