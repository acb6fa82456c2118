"""What a conversion will need, computed from headers: download, disk, memory and time."""

from dataclasses import dataclass

import numpy as np

from hcsmoe_hub.calibration.measured import MEASURED_TOKENS, MOST_DOMAINS
from hcsmoe_hub.checkpoint.pieces import download_bytes, largest_pair
from hcsmoe_hub.checkpoint.tensors import total_bytes
from hcsmoe_hub.methods.clustering.energies import ENERGY_CHUNK, ENERGY_TOKENS
from hcsmoe_hub.methods.refit.cost import FittedLayer
from hcsmoe_hub.methods.refit.down_projections import KEPT_BYTES
from hcsmoe_hub.model.width import neurons_of
from hcsmoe_hub.options import Align, Linkage, Merge, Refit
from hcsmoe_hub.planning.compression_cost import compression_bytes, compression_flops
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.model_refit import model_refit_bytes, model_refit_flops
from hcsmoe_hub.planning.statistics_use import statistics_bytes

# Resident size of a Python process that has imported torch and transformers and run a first layer, without weights.
PROCESS_BYTES = 480_000_000
# What reading text adds: the datasets library, Arrow and the tokenizer.
TEXT_BYTES = 150_000_000
# Fusing the stored tensors of a layer briefly holds a part of it twice; the figure is for per-expert checkpoints.
LOADING_FACTOR = 1.35
# Per pair of neurons: similarity in float32, its copy in float64, and what the assignment works with (measured).
ASSIGNMENT_BYTES = 21
# Copies of the hidden states that the refit of down projections holds.
FITTED_STATES = 7
# Of a number in the matrix products of a descent; where these are in float32, no copy is needed.
PRODUCT_BYTES = 2
# Predictions of both models, and their logarithms in float64: bytes per token and entry of the vocabulary.
LOGIT_BYTES = 48
# Memory that predictions may take at a time.
LOGITS_BYTES = 256_000_000
# Copies of the hidden activations of one expert while the energies of its neurons are added up.
ENERGY_COPIES = 4
# Rough reading speed of a local disk, for the estimate of time only.
DISK_BYTES_PER_SECOND = 1e9
# Besides matrix products there are activations, attention and clustering.
COMPUTE_OVERHEAD = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """What the largest decoder layer weighs, and what all of them compute per token.

    Attributes:
        layer_bytes: Bytes of the largest decoder layer in memory.
        merged_bytes: Bytes of its experts after the merge.
        rest_bytes: Bytes of everything outside the decoder layers.
        flops_per_token: Floating-point operations per calibration token, over all layers.
        measured_flops_per_token: The same per held-out token, with the heads of both models.
    """

    layer_bytes: int
    merged_bytes: int
    rest_bytes: int
    flops_per_token: int
    measured_flops_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a conversion needs.

    Attributes:
        download_bytes: Weights that are not on this machine yet; twice where they are deleted and read again.
        cache_bytes: Most that they take on the disk of the cache.
        disk_bytes: Most that the result takes on the disk of the output.
        statistics_bytes: Size of the statistics file that is written; 0 if none is.
        memory_bytes: Peak of resident memory.
        device_bytes: Peak of the accelerator's memory, 0 on the CPU.
        flops: Floating-point operations of the whole run.
        seconds: Estimated time without the download, ``None`` if the speed of the device is unknown.
    """

    download_bytes: int
    cache_bytes: int
    disk_bytes: int
    statistics_bytes: int
    memory_bytes: int
    device_bytes: int
    flops: int
    seconds: float | None = None


def layer_cost(plan: ConversionPlan) -> LayerCost:
    """Sizes and arithmetic of a plan's layers, from the shapes of both models."""
    model, experts_after = plan.model, plan.experts
    state, itemsize = model.skeleton.state, model.skeleton.dtype.itemsize
    sizes = {
        layer: sum(state[name].numel() for name in set(group.targets.values())) for layer, group in model.groups.items()
    }
    merged = max(sum(plan.state[tensor.name].numel() for tensor in block.experts) for block in model.blocks)
    layers = [size for layer, size in sizes.items() if layer is not None]
    experts = model.expert_parameters()
    kept = kept_parameters(plan)
    share_before = model.settings.experts_per_token / model.settings.experts
    share_after = plan.settings.experts_per_token / experts_after
    # For mean outputs gate and up run on every token; otherwise experts run on the tokens that are routed to them.
    matrices = _matrices(plan)
    runs_all = plan.runs_source and (plan.needs_mean_outputs or plan.writes_statistics)
    share = (matrices - 1 + share_before) / matrices if runs_all else share_before
    active = sum(layers) - experts + experts * share + kept * share_after
    others = sum(layers) - experts
    if plan.recipe.propagates:
        # The reduced model's hidden states run through the source's layer without its experts, and the reduced one.
        active += 2 * others + kept * share_after
    head = model.skeleton.text_config.hidden_size * model.skeleton.text_config.vocab_size
    measured = 2 * (others + head) + experts * share_before + kept * share_after
    return LayerCost(
        layer_bytes=max(layers) * itemsize,
        merged_bytes=merged * itemsize,
        rest_bytes=sizes.get(None, 0) * itemsize,
        flops_per_token=int(2 * active),
        measured_flops_per_token=int(2 * measured),
    )


def kept_parameters(plan: ConversionPlan) -> int:
    """Parameters of all routed experts of the result, those of layouts with N copies counted once."""
    before = plan.model.settings.experts * neurons_of(plan.model)
    return plan.model.expert_parameters() * plan.experts * plan.width // before


def expert_parameters(plan: ConversionPlan) -> int:
    """Parameters of one expert."""
    return plan.model.expert_parameters() // (plan.model.settings.experts * len(plan.model.blocks))


def _matrices(plan: ConversionPlan) -> int:
    """Matrices of one expert: a gate, an up and a down projection, or no gate."""
    hidden = plan.model.skeleton.text_config.hidden_size
    # Biases are a small part of one more.
    return max(2, expert_parameters(plan) // (hidden * neurons_of(plan.model)))


def matching_bytes(plan: ConversionPlan) -> int:
    """Memory for comparing the neurons of one cluster with each other, in the worst case.

    ZipIt holds one float32 matrix over all neurons of a cluster, which can have as many members as experts are merged
    away, and one more; the assignments of the others hold a few matrices over the neurons of one expert.
    """
    recipe, experts, neurons = plan.recipe, plan.model.settings.experts, neurons_of(plan.model)
    if recipe.merge is Merge.ZIPIT:
        members = min(experts - plan.experts + 1, recipe.max_cluster_size or experts)
        return 4 * (members * neurons) ** 2
    matches = recipe.features is not None or recipe.align not in (None, Align.NONE)
    return ASSIGNMENT_BYTES * neurons**2 if matches else 0


def energy_bytes(plan: ConversionPlan) -> int:
    """Memory for the energies of neurons, and for what clusters of them have added up."""
    if not plan.recipe.needs_energies:
        return 0
    experts, neurons = plan.model.settings.experts, neurons_of(plan.model)
    tables = (2 if plan.recipe.linkage is Linkage.LOSS else 1) * 4 * experts**2 * neurons
    hidden = plan.model.skeleton.text_config.hidden_size * plan.model.skeleton.dtype.itemsize
    return tables + ENERGY_COPIES * 4 * min(ENERGY_CHUNK, ENERGY_TOKENS * neurons) + ENERGY_TOKENS * hidden


def energy_flops(plan: ConversionPlan) -> int:
    """Operations of all layers for the energies of neurons: every expert's activations, and sums of their squares."""
    if not plan.recipe.needs_energies:
        return 0
    experts, neurons = plan.model.settings.experts, neurons_of(plan.model)
    hidden, tokens = plan.model.skeleton.text_config.hidden_size, min(ENERGY_TOKENS, plan.calibration.tokens)
    per_layer = 2 * tokens * experts * neurons * ((_matrices(plan) - 1) * hidden + experts)
    return per_layer * len(plan.experts_by_layer)


def refit_bytes(plan: ConversionPlan) -> int:
    """Memory for a refit: its own experts, its tokens, and what its equations or its optimiser need."""
    refit, neurons = plan.recipe.refit, plan.width
    hidden, tokens = plan.model.skeleton.text_config.hidden_size, plan.calibration.tokens
    experts = 4 * kept_parameters(plan) // len(plan.model.blocks)
    # Tokens, both outputs, what is wanted, and the parts of these that are fitted.
    states = 4 * FITTED_STATES * tokens * hidden
    kept = min(KEPT_BYTES, 8 * plan.experts * neurons**2)
    kept += min(KEPT_BYTES, 4 * tokens * plan.model.settings.experts_per_token * neurons)
    equations = 3 * 8 * neurons**2
    match refit:
        case Refit.DOWN:
            return experts + states + kept + equations
        case Refit.BLOCK | Refit.MODEL:
            return fitted_layer(plan).block_bytes(
                itemsize=plan.model.skeleton.dtype.itemsize, product_itemsize=PRODUCT_BYTES
            )
        case _:
            return 0


def gram_bytes(plan: ConversionPlan) -> int:
    """Memory for the outputs of one micro-batch, choice by choice, whose products are added up."""
    if not plan.needs_gram and not plan.writes_statistics:
        return 0
    tokens = min(plan.batch_tokens, plan.calibration.tokens)
    return 4 * tokens * plan.model.settings.experts_per_token * plan.model.skeleton.text_config.hidden_size


def measured_tokens(plan: ConversionPlan) -> int:
    """Most tokens that the cost of a conversion is measured on."""
    has_text = plan.statistics is None or plan.statistics.has_text
    is_measured = plan.options.measure and has_text and not plan.calibration.is_token_ids
    # A sequence of every domain, though how many there are shows only when the text is read.
    most = max(MEASURED_TOKENS, MOST_DOMAINS * plan.calibration.sequence_length)
    return min(most, plan.calibration.tokens) if is_measured else 0


def head_bytes(plan: ConversionPlan) -> int:
    """Memory for comparing predictions at the end: the head, where it runs on a device, and some logits."""
    if not measured_tokens(plan):
        return 0
    config = plan.model.skeleton.text_config
    head = config.vocab_size * config.hidden_size * plan.model.skeleton.dtype.itemsize if plan.on_device else 0
    return int(head + LOGIT_BYTES * config.vocab_size * min(logit_tokens(config.vocab_size), MEASURED_TOKENS))


def logit_tokens(vocabulary: int) -> int:
    """Tokens whose predictions are compared at a time.

    Args:
        vocabulary: Number of logits.
    """
    return max(16, LOGITS_BYTES // (LOGIT_BYTES * vocabulary))


def encoding_bytes(plan: ConversionPlan, experts_bytes: int) -> int:
    """Memory for the experts of a layer in the format of the source: their parts, and what is decoded from them.

    Args:
        plan: The conversion.
        experts_bytes: Bytes of these experts in the dtype of the model.
    """
    # In between, stored tensors are taken out of those of the model and put together again.
    return 3 * experts_bytes if plan.keeps_format else 0


def refit_flops(plan: ConversionPlan) -> float:
    """Operations of the refits of all layers."""
    layer, layers = fitted_layer(plan), len(plan.experts_by_layer)
    match plan.recipe.refit:
        case Refit.DOWN:
            return layers * layer.down()
        case Refit.BLOCK | Refit.MODEL:
            return layers * layer.block(plan.recipe.refit_passes or 1)
        case _:
            return 0.0


def fitted_layer(plan: ConversionPlan) -> FittedLayer:
    """Sizes of a layer that is refitted."""
    return FittedLayer(
        hidden=plan.model.skeleton.text_config.hidden_size,
        neurons=plan.width,
        experts=plan.experts,
        top_k=plan.settings.experts_per_token,
        tokens=plan.calibration.tokens,
        matrices=_matrices(plan),
    )


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


def estimate_needs(plan: ConversionPlan, *, flops_per_second: float | None = None) -> Needs:
    """Adds up the peak: the rest of the model, the layer at work, the one being loaded, and the hidden states.

    Args:
        plan: The conversion.
        flops_per_second: Measured speed of the device, for the estimate of time.
    """
    cost, source = layer_cost(plan), plan.model.source
    tokens, itemsize = plan.calibration.tokens, plan.model.skeleton.dtype.itemsize
    token_bytes = plan.model.skeleton.text_config.hidden_size * itemsize
    # Input and output of the layer, input of its MoE block, and what its experts returned; of each of both streams.
    states = (8 if plan.recipe.propagates else 4) * tokens * token_bytes
    # Of held-out tokens only input and output of the layer, but of both models.
    measured = measured_tokens(plan)
    states += 4 * measured * token_bytes
    layers = int(cost.layer_bytes * (1 + LOADING_FACTOR)) + cost.merged_bytes
    layers += encoding_bytes(plan, cost.merged_bytes)
    at_work = layers + 16 * min(plan.batch_tokens, tokens) * token_bytes + gram_bytes(plan)
    # The layers are gone when the head runs, on the device if there is one.
    at_work = max(at_work, head_bytes(plan))
    # Energies are gone before anything is refitted.
    matching = matching_bytes(plan) + max(energy_bytes(plan), refit_bytes(plan), compression_bytes(plan))
    process = PROCESS_BYTES + (0 if plan.calibration.is_token_ids else TEXT_BYTES)
    flops = cost.flops_per_token * tokens + cost.measured_flops_per_token * measured
    flops += energy_flops(plan) + compression_flops(plan) + int(refit_flops(plan) + model_refit_flops(plan))
    seconds, written = None, statistics_bytes(plan, measured)
    if flops_per_second is not None:
        moved = total_bytes(source.tensors.values()) + plan.shards.file_bytes + written
        if plan.statistics is not None:
            moved += plan.statistics.bytes
        seconds = COMPUTE_OVERHEAD * flops / flops_per_second + moved / DISK_BYTES_PER_SECOND
    downloaded, held = download_needs(plan)
    converting = cost.rest_bytes + states + matching + (0 if plan.on_device else at_work)
    # It begins when the layers are done.
    training, kept = model_refit_bytes(plan, plan.width)
    return Needs(
        download_bytes=downloaded,
        cache_bytes=held,
        disk_bytes=result_bytes(plan),
        statistics_bytes=written,
        memory_bytes=process + max(converting, kept + (0 if plan.on_device else training)),
        device_bytes=max(at_work, training) if plan.on_device else 0,
        flops=flops,
        seconds=seconds,
    )
