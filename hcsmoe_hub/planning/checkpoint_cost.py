"""What it costs to keep what every layer leaves, so that an interrupted conversion can go on."""

from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.layer_sizes import layer_sizes, measured_tokens
from hcsmoe_hub.planning.model_refit import training_states_bytes

# Hidden states of the last two layers, and those that are being written.
FILES = 3


def state_bytes(plan: ConversionPlan) -> int:
    """Hidden states of all sequences that leave a layer, in both models where they run through both."""
    if not plan.options.checkpoint:
        return 0
    tokens = plan.calibration.tokens if plan.runs_source else 0
    tokens += plan.calibration.tokens if plan.recipe.propagates else 0
    return (tokens + 2 * measured_tokens(plan)) * layer_sizes(plan).token


def checkpoint_bytes(plan: ConversionPlan) -> int:
    """The most that is kept on the disk of the output at a time."""
    return FILES * state_bytes(plan) + training_states_bytes(plan)


def checkpoint_written_bytes(plan: ConversionPlan) -> int:
    """All that is written over the whole conversion.

    Of a training of the whole model, it is what that keeps at a time: how often it saves a state depends on how long it
    takes, and adds at most 5 % to that.
    """
    passes = 1 if plan.is_final else 2
    return passes * plan.model.skeleton.depth * state_bytes(plan) + training_states_bytes(plan)
