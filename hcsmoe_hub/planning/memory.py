"""Whether a conversion fits into memory, and which cheaper one would."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.machine.units import format_bytes, format_list
from hcsmoe_hub.options import ConvertOptions, Merge, Preset, Propagate, Refit, default_samples
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.estimate import Needs, estimate_needs
from hcsmoe_hub.planning.refusals import check_recipe, suit_default
from hcsmoe_hub.recipe.recipe import Recipe

# What is cheaper than the method of a plan, in the order in which it is offered.
_CHEAPER: tuple[Mapping[str, Any], ...] = (
    {"refit": Refit.BLOCK},
    {"preset": Preset.HC_SMOE},
    {"preset": Preset.REAP},
    {"refit": Refit.DOWN, "refit_passes": None},
    {"refit": Refit.NONE, "refit_passes": None},
    {"propagate": Propagate.ORIGINAL},
    {"merge": Merge.FREQUENCY},
)
# Most that are offered.
_OFFERED = 2
# The least share of the planned text that is worth converting on, unless it is more than the usual amount.
_LEAST_TEXT = 16


def memory_shortage(plan: ConversionPlan, needs: Needs, *, available: int) -> PlanError | None:
    """What is wrong if the estimated peak is more than this machine has; ``None`` if it fits.

    Args:
        plan: The conversion.
        needs: What it needs.
        available: Bytes that this process can reach.
    """
    if needs.memory_bytes <= available:
        return None
    return PlanError(
        f"the conversion needs about {format_bytes(needs.memory_bytes)} of memory, but {format_bytes(available)} are "
        "available.",
        hint=_hint(
            cheaper_options(plan, available) or ["a machine with more memory"],
            "set `max_memory_bytes` above the estimate to start regardless",
        ),
        option="max_memory_bytes",
    )


def memory_refusal(plan: ConversionPlan, needs: Needs) -> PlanError | None:
    """What is wrong if the estimated peak is above the limit that was set; ``None`` without a limit, or below it."""
    limit = plan.options.max_memory_bytes
    if limit is None or needs.memory_bytes <= limit:
        return None
    return PlanError(
        f"the conversion needs about {format_bytes(needs.memory_bytes)} of memory, more than the "
        f"{format_bytes(limit)} of `max_memory_bytes`.",
        hint=_hint(cheaper_options(plan, limit), "raise `max_memory_bytes`"),
    )


def _hint(cheaper: Sequence[str], otherwise: str) -> str:
    return f"use {format_list(cheaper, 'or')}, or {otherwise}" if cheaper else otherwise


def cheaper_options(plan: ConversionPlan, room: int) -> list[str]:
    """Options that would make a conversion fit into so many bytes, each with what it would then need."""
    methods = _other_methods(plan, room)
    texts = _less_text(plan, room)
    return [*methods[: _OFFERED - len(texts)], *texts] or _both(plan, room)


def _other_methods(plan: ConversionPlan, room: int) -> list[str]:
    return [
        f"{words} ({format_bytes(needed)})"
        for words, cheaper in _cheaper_plans(plan)
        if (needed := estimate_needs(cheaper).memory_bytes) <= room
    ]


def _cheaper_plans(plan: ConversionPlan) -> Iterator[tuple[str, ConversionPlan]]:
    """Plans of the same conversion by cheaper methods, with the option that asks for each."""
    for changes in _CHEAPER:
        options = replace(plan.options, method=replace(plan.options.method, **changes))
        recipe = _possible_recipe(plan, options)
        if recipe is None or recipe == plan.recipe or recipe.layout is not plan.recipe.layout:
            continue
        cheaper = replace(plan, options=options, recipe=recipe)
        if options.calibration.samples is None and _reads_text(plan):
            samples = default_samples(plan.calibration.sequence_length, fits=recipe.refits)
            cheaper = replace(cheaper, calibration=replace(plan.calibration, sequences=samples))
        name, value = next(iter(changes.items()))
        yield f"`{name}='{value}'`", cheaper


def _possible_recipe(plan: ConversionPlan, options: ConvertOptions) -> Recipe | None:
    """The recipe of other options for the same model; ``None`` if they are refused."""
    try:
        recipe, _ = suit_default(plan.model, options)
        check_recipe(plan.model, recipe, options, experts=plan.experts)
    except PlanError:
        return None
    return recipe


def _reads_text(plan: ConversionPlan) -> bool:
    """Whether the number of samples is a choice: token ids and statistics have theirs."""
    return plan.statistics is None and not plan.calibration.is_token_ids


def _less_text(plan: ConversionPlan, room: int) -> list[str]:
    """The most samples that fit, if that is a fair share of what was planned."""
    if not _reads_text(plan):
        return []
    planned = plan.calibration.sequences
    # The estimate grows with the text, so the largest number that fits is found by halving.
    least = min(-(-planned // _LEAST_TEXT), default_samples(plan.calibration.sequence_length, fits=False))
    most = planned - 1
    if least > most or _with_samples(plan, least) > room:
        return []
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if _with_samples(plan, middle) <= room else (least, middle - 1)
    return [f"`samples={least}` ({format_bytes(_with_samples(plan, least))})"]


def _with_samples(plan: ConversionPlan, samples: int) -> int:
    return estimate_needs(replace(plan, calibration=replace(plan.calibration, sequences=samples))).memory_bytes


def _both(plan: ConversionPlan, room: int) -> list[str]:
    """A cheaper method on less text, where neither is enough alone."""
    for words, cheaper in _cheaper_plans(plan):
        if texts := _less_text(cheaper, room):
            return [f"{words} with {texts[0]}"]
    return []
