"""Narrows the experts of a layer: runs them on the tokens that are routed to them, and keeps the best neurons.

C experts, I neurons of each, W neurons of each in the result, R inputs of experts, H hidden size.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.layer.neuron_energies import LEAST_ROWS, added_up, routed_inputs, routed_tokens
from hcsmoe_hub.machine.smaller_pieces import first_that_fits, halves
from hcsmoe_hub.methods.clustering import Clusters
from hcsmoe_hub.methods.clustering.energies import ENERGY_CHUNK
from hcsmoe_hub.methods.merging.narrowing import best_of_experts, magnitudes, narrow
from hcsmoe_hub.model.blocks import MoEBlock
from hcsmoe_hub.model.expert_kinds import experts_of
from hcsmoe_hub.model.experts import Experts
from hcsmoe_hub.observation.watcher import Observation


def narrow_experts(
    layer: LayerContext,
    rows: Mapping[str, Tensor],
    clusters: Clusters,
    seen: Observation,
    *,
    given_CW: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Leaves every expert the neurons that add most to the output on the tokens of its cluster.

    Args:
        layer: The layer; the weights of its block in the source are in memory.
        rows: Tensors of its merged or kept experts by name relative to the experts module, ``[C, ...]``.
        clusters: Which source experts each of them stands for.
        seen: What was observed of the source's block.
        given_CW: The neurons that each keeps, int64, if another conversion has chosen them.

    Returns:
        The same with W neurons per expert, and their numbers ``[C, W]`` int64.
    """
    view, kept_CW = layer.source.experts.neurons, given_CW
    if kept_CW is None:
        energy_CI = _energies(layer, rows, clusters, seen)
        kept_CW = best_of_experts(energy_CI, magnitudes(view(rows)).to(energy_CI.device), layer.shape.width)
    return narrow(rows, view, kept_CW, layer.expert_shapes()), kept_CW


def _energies(layer: LayerContext, rows: Mapping[str, Tensor], clusters: Clusters, seen: Observation) -> Tensor:
    """Output energy of every neuron of some experts on the tokens routed to their clusters: ``[C, I]`` float32."""
    (outputs_CIH,) = layer.source.experts.neurons(rows).outputs
    energy_CI = torch.zeros(outputs_CIH.shape[:2], device=layer.device)
    routed, is_weighted_before = routed_tokens(layer.source, seen.calls), layer.source.experts.scales_input
    with _holding(layer, rows) as experts:
        for inputs_RH, weight_RC, _ in routed_inputs(routed, clusters.labels, scales_input=is_weighted_before):
            for expert in range(len(energy_CI)):
                token = weight_RC[:, expert].nonzero()[:, 0]
                given = _Given(experts, expert, inputs_RH[token], weight_RC[token, expert])
                energy_CI[expert] += given.energy(layer.device)
    size_CI = torch.stack([outputs_IH.float().square().sum(-1) for outputs_IH in outputs_CIH])
    return added_up(energy_CI, layer.device) * size_CI.to(layer.device)


@dataclass(frozen=True, slots=True, eq=False)
class _Given:
    """What one expert is given: inputs, and the weight of each."""

    experts: Experts
    expert: int
    inputs_RH: Tensor
    weight_R: Tensor

    def energy(self, device: torch.device) -> Tensor:
        """Sum over inputs of the squared, weighted activation of every neuron, ``[I]`` float32.

        Args:
            device: Where the expert runs.
        """
        most = max(1, ENERGY_CHUNK // max(1, self.inputs_RH.shape[1]))

        def attempt(rows: int) -> Tensor:
            starts = range(0, max(1, len(self.inputs_RH)), rows)
            total, *others = (self._part(slice(start, start + rows), device) for start in starts)
            for added_I in others:
                total = total + added_I
            return total

        return first_that_fits(attempt, list(halves(most, LEAST_ROWS)), device)

    def _part(self, part: slice, device: torch.device) -> Tensor:
        with torch.no_grad():
            hidden_RI = self.experts.hidden(self.expert, self.inputs_RH[part].to(device)).float().square_()
        return self.weight_R[part].to(device).square() @ hidden_RI


@contextmanager
def _holding(layer: LayerContext, rows: Mapping[str, Tensor]) -> Iterator[Experts]:
    """The experts module of the source with other experts in it, inside a ``with`` block."""
    block: MoEBlock = layer.block
    module = layer.source.skeleton.module
    places = {}
    for tensor in block.experts:
        owner, _, attribute = tensor.name.rpartition(".")
        holder = module.get_submodule(owner)
        rows_C = rows[block.name_in_experts(tensor)]
        value = tensor.join(rows_C, rows_C[:0]).to(layer.device)
        places[tensor.name] = (holder, attribute, holder._parameters[attribute])
        holder._parameters[attribute] = nn.Parameter(value, requires_grad=False)
    try:
        yield experts_of(module.get_submodule(block.experts_path))
    finally:
        for holder, attribute, before in places.values():
            holder._parameters[attribute] = before
