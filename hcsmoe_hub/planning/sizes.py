"""How many parameters a model has, how many of them a token uses, and what fewer experts would leave."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hcsmoe_hub.checkpoint.config_json import MoESettings
from hcsmoe_hub.checkpoint.tensors import total_bytes
from hcsmoe_hub.model.blocks import ExpertTensor, MoEBlock
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.expert_shape import ExpertShape
from hcsmoe_hub.planning.factored_layout import expert_flops, factor_tensors
from hcsmoe_hub.planning.tensor_fates import MtpRule
from hcsmoe_hub.report import Change, CompressionRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """What a model would have with fewer experts, apart from the few rows of its routers.

    Attributes:
        experts: Experts per MoE layer.
        parameters: All parameters.
        weights_bytes: Bytes of all stored tensors.
    """

    experts: int
    parameters: int
    weights_bytes: int


def parameter_counts(plan: ConversionPlan) -> Change:
    """Parameters of all that the source and the result store, shared ones counted once."""
    return {"before": plan.model.parameters, "after": plan.parameters_after}


def active_parameter_counts(plan: ConversionPlan) -> Change:
    """Parameters of the source and of the result that one token uses."""
    after = active_parameters_of(plan.model, plan.stored_state, plan.shape, plan.settings.experts_per_token)
    return {"before": active_parameters(plan.model), "after": after}


def weight_bytes(plan: ConversionPlan) -> Change:
    """Bytes of all stored tensors of the source and of the result."""
    return {
        "before": total_bytes(plan.model.source.tensors.values()),
        "after": total_bytes(plan.shards.tensors.values()),
    }


def compression_record(plan: ConversionPlan) -> CompressionRecord | None:
    """What every expert matrix of the result is stored as; ``None`` where it is whole."""
    if plan.factors is None:
        return None
    return {
        "rank": plan.factors.rank,
        "incoming_rows": plan.factors.incoming_rows,
        "outgoing_rows": plan.factors.outgoing_rows,
        "expert_flops_per_token": expert_flops(plan.model, plan.stored_state, plan.settings.experts_per_token),
    }


def active_parameters(model: SourceModel) -> int:
    """Parameters that one token uses: those of the model without an MTP head, and of the experts it is routed to."""
    return _active_parameters(model, model.skeleton.state, model.decoder_blocks, model.settings.experts_per_token)


def active_parameters_of(model: SourceModel, state: Mapping[str, Tensor], shape: ExpertShape, per_token: int) -> int:
    """Parameters of a result that one token uses.

    Args:
        model: The source.
        state: Tensors of the result by their names.
        shape: Number and width of its experts.
        per_token: Active experts of every token.
    """
    return _active_parameters(model, state, tuple(map(shape.block, model.decoder_blocks)), per_token)


def _active_parameters(
    model: SourceModel, state: Mapping[str, Tensor], blocks: Sequence[MoEBlock], per_token: int
) -> int:
    """Parameters that one token uses: see ``_idle_parameters``."""
    head = None if model.skeleton.mtp is None else model.skeleton.mtp.layer
    ahead = (name for name in state if head is not None and model.skeleton.layer_of(name) == head)
    used = model.count(state, ()) - sum(state[name].numel() for name in ahead)
    return used - _idle_parameters(state, blocks, per_token)


def _idle_parameters(state: Mapping[str, Tensor], blocks: Sequence[MoEBlock], per_token: int) -> int:
    """Parameters of the routed experts that are not active for a token, in all layers but an MTP head's.

    Args:
        state: Tensors of the model in question by their names.
        blocks: Its MoE blocks that every token runs through.
        per_token: Active experts of every token.
    """
    idle = 0
    for expert in (expert for block in blocks for expert in _expert_tensors(block, state)):
        tensor = state[expert.name]
        rows = tensor.shape[expert.dim] - expert.extra_rows - per_token * expert.rows_per_expert
        idle += max(rows, 0) * (tensor.numel() // tensor.shape[expert.dim])
    return idle


def _expert_tensors(block: MoEBlock, state: Mapping[str, Tensor]) -> list[ExpertTensor]:
    """What a state holds of the experts of a block: matrices or factors of them, and biases."""
    plain = [tensor for tensor in block.experts if tensor.name in state]
    known = {tensor.name for tensor in plain}
    return plain + [tensor for tensor in factor_tensors(block, state) if tensor.name not in known]


def stored_experts(model: SourceModel) -> dict[int, int]:
    """Experts that each MoE layer of a checkpoint stores; several router rows may share one."""
    if model.expert_map is not None:
        return {layer: max(experts) + 1 for layer, experts in model.expert_map.items()}
    return {block.layer: model.settings.experts for block in model.blocks}


def projections(model: SourceModel) -> list[Projection]:
    """What three quarters and half of the experts would leave, where that is fewer than now and enough for a token.

    There is none for a result with a modelling file: it cannot be converted again.
    """
    if model.expert_map is not None or model.factors is not None:
        return []
    return [_projection(model, kept) for kept in _worth_trying(model.settings)]


def _worth_trying(settings: MoESettings) -> list[int]:
    counts = (settings.experts * 3 // 4, settings.experts // 2)
    return [kept for kept in dict.fromkeys(counts) if settings.experts_per_token <= kept < settings.experts]


def _projection(model: SourceModel, kept: int) -> Projection:
    experts = model.settings.experts
    # An MTP head that a conversion to fewer experts would drop.
    dropped = [] if MtpRule().reason(model) is None else model.mtp_keys
    left = model.parameters - model.expert_parameters() * (experts - kept) // experts
    left -= sum(math.prod(model.tensors[name].shape) for name in dropped)
    parts = set(model.parts_of(dropped))
    staying = total_bytes(tensor for name, tensor in model.source.tensors.items() if name not in parts)
    stored = staying - _expert_bytes(model) * (experts - kept) // experts
    return Projection(experts=kept, parameters=left, weights_bytes=stored)


def _expert_bytes(model: SourceModel) -> int:
    """Bytes of all routed experts as they are stored."""
    experts = {tensor.name for block in model.blocks for tensor in block.experts}
    targets = ((name, target) for group in model.groups.values() for name, target in group.targets.items())
    return sum(model.tensors[name].nbytes for name, target in targets if target in experts)
