"""What training the whole reduced model on its source's logits will need: both models in memory at once."""

import torch

from hcsmoe_hub.machine import accelerator
from hcsmoe_hub.machine.device import compute_dtype
from hcsmoe_hub.methods.distil.text import JUDGE_SHARE, PIECE_TOKENS
from hcsmoe_hub.methods.distil.training import STEP_TOKENS, step_count
from hcsmoe_hub.model.trained import trained_parameters
from hcsmoe_hub.planning.conversion_plan import ConversionPlan

# Bytes of a trained parameter besides the model's own: its master and two moments in float32, and the gradient.
_MASTER_BYTES, _MOMENTS_BYTES = 4, 8
# Values per token that a layer keeps for its gradient, in hidden sizes and in neurons of an active expert.
_KEPT_STATES, _KEPT_NEURONS = 24, 8
# Float32 copies of the logits of a step, both models and the gradient included.
_LOGITS = 7


def model_refit_bytes(plan: ConversionPlan, neurons: int) -> tuple[int, int]:
    """The peak of the training: where the models are, and on the CPU besides.

    Args:
        plan: The conversion.
        neurons: Neurons of one expert.
    """
    if not plan.trains_model:
        return 0, 0
    model, state = plan.model, plan.state
    itemsize, tokens = _itemsize(plan), min(STEP_TOKENS, plan.calibration.tokens)
    trained = sum(state[name].numel() for name in trained_parameters(model))
    both = sum(tensor.numel() for tensor in (*model.skeleton.state.values(), *state.values()))
    text = model.skeleton.text_config
    per_layer = _KEPT_STATES * text.hidden_size + _KEPT_NEURONS * neurons * plan.settings.experts_per_token
    activations = itemsize * tokens * per_layer * model.skeleton.depth + 4 * _LOGITS * tokens * text.vocab_size
    optimiser = trained * (_MASTER_BYTES + _MOMENTS_BYTES + itemsize + 4)
    # The first values and the best ones, as they are stored, and the latter as they are written.
    return itemsize * both + optimiser + activations, 3 * model.dtype.itemsize * trained


def training_states_bytes(plan: ConversionPlan) -> int:
    """The most that the training keeps on the disk at a time: its last two states, and then what has come of it."""
    if not plan.trains_model or not plan.options.checkpoint:
        return 0
    trained = sum(plan.state[name].numel() for name in trained_parameters(plan.model))
    stored = plan.model.dtype.itemsize
    return trained * (2 * (_MASTER_BYTES + _MOMENTS_BYTES + stored) + stored)


def model_refit_flops(plan: ConversionPlan) -> float:
    """Operations of the training: the source forwards, the result forwards and backwards."""
    if not plan.trains_model:
        return 0.0
    model, after = plan.model, plan.settings
    experts = model.expert_parameters()
    whole = sum(tensor.numel() for tensor in model.skeleton.state.values())
    active = whole - experts + experts * model.settings.experts_per_token / model.settings.experts
    left = sum(plan.state[tensor.name].numel() for block in model.blocks for tensor in block.experts)
    reduced = whole - experts + left * after.experts_per_token / after.experts
    fitted = plan.calibration.tokens - plan.calibration.tokens // JUDGE_SHARE
    visits = step_count(max(1, fitted // PIECE_TOKENS), PIECE_TOKENS) * STEP_TOKENS
    return visits * (2 * active + 6 * reduced)


def _itemsize(plan: ConversionPlan) -> int:
    """Bytes of a weight that both models compute with."""
    device = accelerator.place(on_device=plan.on_device)
    is_wide = plan.model.dtype != torch.bfloat16
    return 4 if is_wide else compute_dtype(device).itemsize
