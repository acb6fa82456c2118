"""What a conversion does that costs time, in the units in which rates are given.

T tokens, E source experts, K experts of the result, H hidden size, I neurons of an expert.
"""

from dataclasses import dataclass

import torch

from hcsmoe_hub.checkpoint.tensors import total_bytes
from hcsmoe_hub.methods.clustering.energies import ENERGY_TOKENS
from hcsmoe_hub.methods.refit.descent import Schedule
from hcsmoe_hub.methods.refit.held_out import HELD_OUT_SHARE
from hcsmoe_hub.model.width import neurons_of
from hcsmoe_hub.options import Refit
from hcsmoe_hub.planning.checkpoint_cost import checkpoint_written_bytes
from hcsmoe_hub.planning.compression_cost import compression_flops
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.estimate import energy_flops, layer_cost, refit_flops
from hcsmoe_hub.planning.layer_sizes import attended_tokens, kept_parameters, measured_tokens, token_share
from hcsmoe_hub.planning.model_refit import model_refit_flops
from hcsmoe_hub.planning.statistics_use import statistics_bytes
from hcsmoe_hub.planning.step_memory import fitted_layer

# Tokens on which a router is fitted, and how often its loss and gradient are computed on three quarters of them.
ROUTER_TOKENS, ROUTER_ROUNDS = 16_384, 60
# Passes over the numbers of one token that are not products, float32: per neuron that it runs through (activation,
# gate), per choice and hidden number (gathering, weighting, adding up), and per hidden number of a layer (norms,
# rotations, residuals, what is kept of the layer). Counted in a profile of Mixtral layers.
NEURON_PASSES, CHOICE_PASSES, HIDDEN_PASSES = 10, 14, 60
# Bytes per token and entry of the vocabulary that comparing the predictions of both models touches.
LOGIT_BYTES = 100
# Passes over a parameter: while a layer is loaded and widened, merged and checked, and written.
LOAD_PASSES, MERGE_PASSES, WRITE_PASSES = 3, 4, 3
# Passes over a parameter in a step of Adam: gradients, moments, a copy for the products.
ADAM_PASSES = 14
# Operations that are started per expert and micro-batch of a pass, per micro-batch, and per step of a descent.
EXPERT_LAUNCHES, BATCH_LAUNCHES, STEP_LAUNCHES = 16, 120, 150


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a conversion does besides its refits.

    Attributes:
        read_bytes: Bytes of the source, and of statistics, that are read; of both passes, if there are two.
        written_bytes: Bytes of the result, of statistics, and of what an interrupted conversion could go on from.
        copied_up: Bytes that go to the accelerator.
        copied_down: Bytes that come back from there.
        dtype: Of the model; layers are computed in it where the device has instructions for it.
        large_flops: Products with as many rows as a micro-batch has tokens.
        expert_flops: Products with as many rows as a micro-batch has tokens for one expert.
        expert_rows: These rows.
        float32_flops: Products in float32 whatever the dtype: fits of routers, energies.
        float64_flops: Products and factorisations in float64.
        refit_flops: Products of the refits of layers and of the model, in the dtype of their products.
        touched_bytes: Bytes that operations other than products read and write where layers are computed.
        host_bytes: The same on the host: decoding what is read, encoding what is written.
        launches: Operations that are started.
    """

    read_bytes: int
    written_bytes: int
    copied_up: int
    copied_down: int
    dtype: torch.dtype
    large_flops: float
    expert_flops: float
    expert_rows: float
    float32_flops: float
    float64_flops: float
    refit_flops: float
    touched_bytes: float
    host_bytes: float
    launches: float


def count_work(plan: ConversionPlan) -> Work:
    """Counts what a conversion does."""
    read, written = _moved(plan)
    parameters, passes = _parameters(plan), _passes(plan)
    kept = kept_parameters(plan)
    wide, itemsize = plan.model.skeleton.dtype.itemsize, plan.model.dtype.itemsize
    tokens, rows = plan.calibration.tokens, min(plan.batch_tokens, plan.calibration.tokens)
    large, experts = _forward_flops(plan)
    refit = 0.0 if plan.recipe.refit is Refit.DOWN else refit_flops(plan)
    down = refit_flops(plan) if plan.recipe.refit is Refit.DOWN else 0.0
    return Work(
        read_bytes=read,
        written_bytes=written,
        copied_up=passes * parameters * itemsize,
        copied_down=kept * itemsize,
        dtype=plan.model.dtype,
        large_flops=large,
        expert_flops=experts,
        expert_rows=max(1.0, rows * plan.model.settings.experts_per_token / plan.model.settings.experts),
        float32_flops=energy_flops(plan) + _router_flops(plan) + down,
        float64_flops=float(compression_flops(plan)),
        refit_flops=refit + model_refit_flops(plan),
        touched_bytes=_touched(plan, tokens) + 4 * MERGE_PASSES * (plan.model.expert_parameters() + kept),
        host_bytes=float(wide * (passes * LOAD_PASSES * parameters + WRITE_PASSES * kept)),
        launches=_launches(plan, rows),
    )


def _passes(plan: ConversionPlan) -> int:
    """How often the weights of the source are read."""
    return 1 if plan.is_final else 2


def _moved(plan: ConversionPlan) -> tuple[int, int]:
    """Bytes that are read and written."""
    statistics = statistics_bytes(plan, measured_tokens(plan))
    read = _passes(plan) * total_bytes(plan.model.source.tensors.values())
    read += 0 if plan.statistics is None else plan.statistics.bytes
    return read, plan.shards.file_bytes + statistics + checkpoint_written_bytes(plan)


def _parameters(plan: ConversionPlan) -> int:
    """Parameters of all decoder layers of the source."""
    state = plan.model.skeleton.state
    return sum(
        state[name].numel()
        for layer, group in plan.model.groups.items()
        if layer is not None
        for name in set(group.targets.values())
    )


def _forward_flops(plan: ConversionPlan) -> tuple[float, float]:
    """Products of all layers on the calibration and the held-out tokens: of whole micro-batches, and of experts."""
    cost, tokens, measured = layer_cost(plan), plan.calibration.tokens, measured_tokens(plan)
    total = float(cost.flops_per_token * tokens + cost.measured_flops_per_token * measured)
    settings = plan.model.settings
    routed = plan.model.expert_parameters() * settings.experts_per_token / settings.experts
    routed += kept_parameters(plan) * plan.settings.experts_per_token / plan.experts
    experts = min(total, 2 * routed * token_share(plan, plan.experts_by_layer) * (tokens + measured))
    # Every token attends to all tokens of its sequence, masked or not.
    attended = 4 * plan.model.skeleton.text_config.hidden_size * attended_tokens(plan)
    attention = attended * (tokens + 2 * measured)
    if plan.recipe.propagates:
        attention += attended * tokens
    return total - experts + attention, experts


def _router_flops(plan: ConversionPlan) -> float:
    """Fits of the routers of all layers."""
    if not plan.recipe.fits_router:
        return 0.0
    tokens = 0.75 * min(ROUTER_TOKENS, plan.calibration.tokens)
    hidden = plan.model.skeleton.text_config.hidden_size
    return ROUTER_ROUNDS * 4 * tokens * hidden * plan.experts * len(plan.experts_by_layer)


def _touched(plan: ConversionPlan, tokens: int) -> float:
    """Bytes that operations on single numbers touch."""
    model, settings = plan.model, plan.model.settings
    hidden, neurons, layers = model.skeleton.text_config.hidden_size, neurons_of(model), len(plan.experts_by_layer)
    share, measured = token_share(plan, range(model.skeleton.depth)), measured_tokens(plan)
    every = plan.runs_source and (plan.needs_mean_outputs or plan.writes_statistics)
    run = settings.experts if every else settings.experts_per_token
    source = tokens + measured
    reduced = (2 * tokens if plan.recipe.propagates else tokens) + measured
    choices = source * run + reduced * plan.settings.experts_per_token
    touched = 4 * share * layers * (choices * neurons * NEURON_PASSES + choices * hidden * CHOICE_PASSES)
    touched += 4 * share * model.skeleton.depth * (source + reduced - tokens) * hidden * HIDDEN_PASSES
    if plan.recipe.needs_energies:
        touched += 4 * layers * settings.experts * neurons * NEURON_PASSES * min(ENERGY_TOKENS, tokens)
        # The tables of what one expert's neurons add where another was chosen.
        touched += 4 * 6 * layers * settings.experts**2 * neurons
    touched += LOGIT_BYTES * model.skeleton.text_config.vocab_size * measured
    return float(touched + _refit_touched(plan))


def _refit_touched(plan: ConversionPlan) -> float:
    """Bytes of all parameters that the steps of the refits of layers touch."""
    if plan.recipe.refit not in (Refit.BLOCK, Refit.MODEL):
        return 0.0
    layer = fitted_layer(plan)
    per_token = layer.top_k * (3 * layer.neurons * NEURON_PASSES + 2 * layer.hidden * CHOICE_PASSES)
    visited = layer.tokens * (plan.recipe.refit_passes or 1)
    return 4.0 * len(plan.experts_by_layer) * (_steps(plan) * layer.parameters * ADAM_PASSES + visited * per_token)


def _steps(plan: ConversionPlan) -> int:
    """Steps of the refit of one layer."""
    tokens = plan.calibration.tokens
    return Schedule.over(tokens - tokens // HELD_OUT_SHARE, passes=plan.recipe.refit_passes or 1).steps


def _launches(plan: ConversionPlan, rows: int) -> float:
    """Operations of all layers that are started one by one."""
    batches = -(-plan.calibration.tokens // max(1, rows))
    streams = 4 if plan.recipe.propagates else 2
    experts = plan.model.settings.experts + plan.experts * (streams - 1)
    launches = batches * (EXPERT_LAUNCHES * experts + BATCH_LAUNCHES * streams)
    if plan.recipe.refit in (Refit.BLOCK, Refit.MODEL):
        launches += _steps(plan) * (STEP_LAUNCHES + EXPERT_LAUNCHES * plan.experts)
    return float(launches * len(plan.experts_by_layer))
