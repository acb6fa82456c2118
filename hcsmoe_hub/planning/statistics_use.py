"""What a plan makes of a statistics file: the one that it reuses, and the size of the one that it writes."""

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.machine.units import format_plural
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.observation.statistics_file import StatisticsFile
from hcsmoe_hub.options import ConvertOptions, default_samples
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.recipe.recipe import Recipe

# Float64 numbers per expert, and per pair of experts.
_PER_EXPERT, _PER_PAIR = 5, 2


def open_existing(options: ConvertOptions) -> StatisticsFile | None:
    """The statistics file that the options name; ``None`` if none is named, or it is still to be written.

    Raises:
        CalibrationError: If it is not a statistics file.
    """
    if options.statistics is None or not options.statistics.exists():
        return None
    return StatisticsFile(options.statistics)


def find_statistics(model: SourceModel, recipe: Recipe, options: ConvertOptions) -> StatisticsFile | None:
    """Statistics to reuse; ``None`` if there are none yet.

    Raises:
        CalibrationError: If the file is not a statistics file.
        PlanError: If it belongs to another source or other text, or does not hold what the recipe ranks experts by.
    """
    found = open_existing(options)
    if found is not None:
        found.check(model, options.calibration)
        found.check_scores(recipe)
    return found


def check_text(options: ConvertOptions, choice: str, hint: str) -> None:
    """Checks that a statistics file to reuse, if there is one, holds the text that a choice runs a model on.

    Args:
        options: Name the file.
        choice: The choice, such as ``refit='model'``.
        hint: What else to use in place of it.

    Raises:
        PlanError: If the file is of an earlier version.
    """
    found = open_existing(options)
    if found is not None and not found.has_text:
        raise PlanError(
            f"`{choice}` runs the reduced model on the calibration text, which {found.path} does not hold: an earlier "
            "version collected it.",
            hint=f"name another file to collect statistics again, or use {hint}",
        )


def statistics_notes(plan: ConversionPlan) -> list[str]:
    """What a plan must say about the statistics that it reuses."""
    file = plan.statistics
    if file is None or not plan.works_on_tokens:
        return []
    if not file.has_text:
        sample = format_plural(file.feature_tokens, "token")
        return [
            f"{file.path} has no hidden states, as an earlier version collected it: experts and routers are fitted to "
            f"its sample of {sample} per layer. Name another file to collect statistics again."
        ]
    notes = []
    if not file.has_states:
        notes.append(f"{file.path} was collected without hidden states, so the source runs on its text again.")
    elif file.states_dtype != plan.model.skeleton.dtype:
        before, after = (str(dtype).removeprefix("torch.") for dtype in (file.states_dtype, plan.model.skeleton.dtype))
        notes.append(
            f"the hidden states in {file.path} were computed in {before}, but this machine computes in {after}: the "
            "result differs a little from that of a direct conversion."
        )
    usual = default_samples(file.calibration.sequence_length, fits=plan.recipe.refits)
    is_own_choice = file.content["options"]["samples"] is not None or file.calibration.is_token_ids
    if file.calibration.sequences < usual and not is_own_choice:
        notes.append(
            f"{file.path} holds {format_plural(file.calibration.sequences, 'sequence')}, but a refit usually takes "
            f"{usual}. To fit to as many, collect statistics again with `samples={usual}`."
        )
    return notes


def statistics_bytes(plan: ConversionPlan, measured_tokens: int) -> int:
    """Size of the statistics file that a conversion writes; 0 if it writes none.

    Args:
        plan: The conversion.
        measured_tokens: Most tokens that it is measured on.
    """
    if not plan.writes_statistics:
        return 0
    model, config = plan.model, plan.model.skeleton.text_config
    state_bytes = config.hidden_size * model.skeleton.dtype.itemsize
    experts, tokens = model.settings.experts, plan.calibration.tokens
    layer = 8 * (_PER_EXPERT * experts + _PER_PAIR * experts**2) + 4 * experts * config.hidden_size
    layer += min(plan.feature_tokens, tokens) * state_bytes
    if plan.keeps_states:
        # Inputs of the block, and what leaves the layer, which some architectures keep several copies of.
        layer += (1 + getattr(config, "hc_mult", 1)) * tokens * state_bytes
    return layer * len(model.blocks) + 8 * (tokens + measured_tokens) + measured_tokens * state_bytes
