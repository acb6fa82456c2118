"""What a conversion will need, computed from headers: download, disk, memory and arithmetic."""

from dataclasses import dataclass

import numpy as np

from hcsmoe_hub.checkpoint.pieces import download_bytes, largest_pair
from hcsmoe_hub.checkpoint.tensors import total_bytes
from hcsmoe_hub.methods.clustering.energies import ENERGY_TOKENS
from hcsmoe_hub.model.width import neurons_of
from hcsmoe_hub.options import Merge, Refit
from hcsmoe_hub.planning.checkpoint_cost import checkpoint_bytes
from hcsmoe_hub.planning.compression_cost import compression_flops
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.layer_sizes import kept_parameters, matrices, measured_tokens, token_share
from hcsmoe_hub.planning.memory_use import memory_use
from hcsmoe_hub.planning.model_refit import model_refit_flops
from hcsmoe_hub.planning.statistics_use import statistics_bytes
from hcsmoe_hub.planning.step_memory import fitted_layer


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """What the layers compute per token.

    Attributes:
        flops_per_token: Floating-point operations per calibration token, over all layers.
        measured_flops_per_token: The same per held-out token, with the heads of both models.
    """

    flops_per_token: int
    measured_flops_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a conversion needs.

    Attributes:
        download_bytes: Weights that are not on this machine yet; twice where they are deleted and read again.
        cache_bytes: Most that they take on the disk of the cache.
        disk_bytes: Most that the result takes on the disk of the output.
        checkpoint_bytes: Most that is kept there besides, so that an interrupted conversion can go on.
        statistics_bytes: Size of the statistics file that is written; 0 if none is.
        memory_bytes: Peak of resident memory.
        device_bytes: Peak of the accelerator's memory, 0 on the CPU.
        flops: Floating-point operations of the whole run.
    """

    download_bytes: int
    cache_bytes: int
    disk_bytes: int
    checkpoint_bytes: int
    statistics_bytes: int
    memory_bytes: int
    device_bytes: int
    flops: int


def layer_cost(plan: ConversionPlan) -> LayerCost:
    """Arithmetic of a plan's layers, from the shapes of both models."""
    model, state, experts_after = plan.model, plan.model.skeleton.state, plan.experts
    sizes = {
        layer: sum(state[name].numel() for name in set(group.targets.values())) for layer, group in model.groups.items()
    }
    layers = [size * token_share(plan, [layer]) for layer, size in sizes.items() if layer is not None]
    routed = token_share(plan, plan.experts_by_layer)
    experts = model.expert_parameters() * routed
    kept = kept_parameters(plan) * routed
    share_before = model.settings.experts_per_token / model.settings.experts
    share_after = plan.settings.experts_per_token / experts_after
    # For mean outputs gate and up run on every token; otherwise experts run on the tokens that are routed to them.
    vectors = matrices(plan)
    runs_all = plan.runs_source and (plan.needs_mean_outputs or plan.writes_statistics)
    share = (vectors - 1 + share_before) / vectors if runs_all else share_before
    active = sum(layers) - experts + experts * share + kept * share_after
    others = sum(layers) - experts
    if plan.recipe.propagates:
        # The reduced model's hidden states run through the source's layer without its experts, and the reduced one.
        active += 2 * others + kept * share_after
    head = model.skeleton.text_config.hidden_size * model.skeleton.text_config.vocab_size
    measured = 2 * (others + head) + experts * share_before + kept * share_after
    return LayerCost(
        flops_per_token=int(2 * active),
        measured_flops_per_token=int(2 * measured),
    )


def energy_flops(plan: ConversionPlan) -> int:
    """Operations of all layers for the energies of neurons: every expert's activations, and sums of their squares."""
    if not plan.recipe.needs_energies:
        return 0
    experts, neurons = plan.model.settings.experts, neurons_of(plan.model)
    hidden, tokens = plan.model.skeleton.text_config.hidden_size, min(ENERGY_TOKENS, plan.calibration.tokens)
    per_layer = 2 * tokens * experts * neurons * ((matrices(plan) - 1) * hidden + experts)
    return per_layer * len(plan.experts_by_layer)


def refit_flops(plan: ConversionPlan) -> float:
    """Operations of the refits of all layers."""
    layer = fitted_layer(plan)
    layers = len(plan.experts_by_layer) * token_share(plan, plan.experts_by_layer)
    match plan.recipe.refit:
        case Refit.DOWN:
            return layers * layer.down()
        case Refit.BLOCK | Refit.MODEL:
            return layers * layer.block(plan.recipe.refit_passes or 1)
        case _:
            return 0.0


def download_needs(plan: ConversionPlan) -> tuple[int, int]:
    """Bytes that are downloaded, and the most of them that is on disk at a time."""
    source, low_disk = plan.model.source, plan.options.low_disk
    pieces = source.pieces(plan.reading_order, low_disk=low_disk)
    whole = download_bytes(pieces)
    if not low_disk:
        return whole, whole
    # A plan that is not final reads the layers twice, and the first pass leaves nothing behind.
    first = [] if plan.is_final else source.pieces(plan.observing_order, low_disk=low_disk)
    return download_bytes(first) + whole, largest_pair(pieces)


def result_bytes(plan: ConversionPlan) -> int:
    """The most of a result that is on disk at a time: one that is sent away goes shard by shard."""
    if plan.sends_away:
        return max(len(plan.shards.headers[name]) + total_bytes(shard) for name, shard in plan.shards.files.items())
    return plan.shards.file_bytes + _neuron_file_bytes(plan)


def _neuron_file_bytes(plan: ConversionPlan) -> int:
    """The file that lists where neurons come from, as it would be without compression."""
    if plan.recipe.merge is not Merge.NEURONS and not plan.is_narrower:
        return 0
    greatest = (plan.model.settings.experts - 1, neurons_of(plan.model) - 1)
    per_neuron = sum(np.min_scalar_type(number).itemsize for number in greatest)
    return per_neuron * plan.width * sum(plan.experts_by_layer.values())


def estimate_needs(plan: ConversionPlan) -> Needs:
    """What a conversion needs of each resource."""
    cost = layer_cost(plan)
    tokens, measured = plan.calibration.tokens, measured_tokens(plan)
    flops = cost.flops_per_token * tokens + cost.measured_flops_per_token * measured
    flops += energy_flops(plan) + compression_flops(plan) + int(refit_flops(plan) + model_refit_flops(plan))
    downloaded, held = download_needs(plan)
    memory = memory_use(plan)
    return Needs(
        download_bytes=downloaded,
        cache_bytes=held,
        disk_bytes=result_bytes(plan),
        checkpoint_bytes=checkpoint_bytes(plan),
        statistics_bytes=statistics_bytes(plan, measured),
        memory_bytes=memory.host,
        device_bytes=memory.device,
        flops=flops,
    )
