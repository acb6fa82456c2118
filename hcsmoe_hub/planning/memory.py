"""Whether a conversion fits into the memory of the host and of the accelerator, and which cheaper one would."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.machine import accelerator
from hcsmoe_hub.machine.units import format_bytes, format_list
from hcsmoe_hub.options import Merge, Preset, Propagate, Refit, default_samples
from hcsmoe_hub.options.memory_limits import HOST, limit_of, read_limits
from hcsmoe_hub.planning.alternatives import reads_text, with_method
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.estimate import Needs, estimate_needs
from hcsmoe_hub.planning.placement import placed

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


class Place(StrEnum):
    """Which memory is short."""

    HOST = "host"
    DEVICE = "device"


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
            "set `max_memory` above the estimate to start regardless",
        ),
        option="max_memory",
    )


def device_shortage(plan: ConversionPlan, needs: Needs) -> PlanError | None:
    """What is wrong if the accelerator is too small; ``None`` if the conversion fits, or does not run on one.

    Args:
        plan: The conversion; as much of it as possible is on the host already.
        needs: What it needs.
    """
    room = plan.device_room
    if room is None or needs.device_bytes <= room:
        return None
    needed, device = format_bytes(needs.device_bytes), device_name(plan)
    whose = f"`max_memory` allows {format_bytes(room)}" if limits_device(plan) else f"{format_bytes(room)} are free"
    if plan.trains_model:
        message = f"`refit='model'` needs about {needed} on {device} for the source and the result at once"
    else:
        message = f"the conversion needs about {needed} on {device}"
    return PlanError(
        f"{message}, but {whose} there.",
        hint=_hint(cheaper_options(plan, room, Place.DEVICE), "`device='cpu'`", is_option=True),
        option="device",
    )


def device_name(plan: ConversionPlan) -> str:
    """What the accelerator of a plan is called."""
    name = plan.options.device
    return name if ":" in name else str(accelerator.place(on_device=True))


def limits_device(plan: ConversionPlan) -> bool:
    """Whether the options say how much memory of an accelerator may be used."""
    limits = plan.options.max_memory
    return limits is not None and any(place != HOST for place in read_limits(limits))


def savings(plan: ConversionPlan) -> list[str]:
    """What takes less memory than a plan, as parts of a sentence, for a conversion whose memory has run out."""
    place = Place.DEVICE if plan.on_device else Place.HOST
    needed = _needed(plan, place)
    found = ["fewer `samples`"] if reads_text(plan) else []
    # A micro-batch is a sequence at least.
    found += ["a smaller `batch_tokens`"] if plan.batch_tokens > plan.calibration.sequence_length else []
    found += [words for words, cheaper in _cheaper_plans(plan) if _needed(cheaper, place) < needed][:_OFFERED]
    return [*found, "`device='cpu'`"] if plan.on_device else found


def fallback_warning(shortage: PlanError) -> str:
    """What a plan says that runs on the host because the accelerator is too small.

    Args:
        shortage: What is wrong with the accelerator.
    """
    offers, separator, _ = shortage.hint.rpartition(", or `device='cpu'`")
    more = f" To run it there, {offers}." if separator else ""
    return f"{shortage.message} It runs on the CPU instead, as `device='auto'` allows.{more}"


def memory_refusal(plan: ConversionPlan, needs: Needs) -> PlanError | None:
    """What is wrong if an estimated peak is above a limit that was set; ``None`` without limits, or below them."""
    limit = limit_of(plan.options.max_memory, None)
    if limit is None or needs.memory_bytes <= limit:
        return device_shortage(plan, needs) if limits_device(plan) else None
    return PlanError(
        f"the conversion needs about {format_bytes(needs.memory_bytes)} of memory, more than the "
        f"{format_bytes(limit)} of `max_memory`.",
        hint=_hint(cheaper_options(plan, limit), "raise `max_memory`"),
    )


def _hint(cheaper: Sequence[str], otherwise: str, *, is_option: bool = False) -> str:
    """What to do: one of the cheaper options, or something else, which may be one more of them."""
    if not cheaper:
        return f"use {otherwise}" if is_option else otherwise
    return f"use {format_list(cheaper, 'or')}, or {otherwise}"


def cheaper_options(plan: ConversionPlan, room: int, place: Place = Place.HOST) -> list[str]:
    """Options that would make a conversion fit into so many bytes, each with what it would then need.

    Args:
        plan: The conversion.
        room: The bytes.
        place: Where they are.
    """
    methods = _other_methods(plan, room, place)
    texts = _less_text(plan, room, place)
    return [*methods[: _OFFERED - len(texts)], *texts] or _both(plan, room, place)


def _needed(plan: ConversionPlan, place: Place) -> int:
    """Bytes that a plan needs in one place."""
    needs = estimate_needs(placed(plan))
    return needs.memory_bytes if place is Place.HOST else needs.device_bytes


def _other_methods(plan: ConversionPlan, room: int, place: Place) -> list[str]:
    return [
        f"{words} ({format_bytes(needed)})"
        for words, cheaper in _cheaper_plans(plan)
        if (needed := _needed(cheaper, place)) <= room
    ]


def _cheaper_plans(plan: ConversionPlan) -> Iterator[tuple[str, ConversionPlan]]:
    """Plans of the same conversion by cheaper methods, with the option that asks for each."""
    for changes in _CHEAPER:
        cheaper = with_method(plan, changes)
        if cheaper is not None:
            name, value = next(iter(changes.items()))
            yield f"`{name}='{value}'`", cheaper


def _less_text(plan: ConversionPlan, room: int, place: Place) -> list[str]:
    """The most samples that fit, if that is a fair share of what was planned."""
    if not reads_text(plan):
        return []
    planned = plan.calibration.sequences
    # The estimate grows with the text, so the largest number that fits is found by halving.
    least = min(-(-planned // _LEAST_TEXT), default_samples(plan.calibration.sequence_length, fits=False))
    most = planned - 1
    if least > most or _with_samples(plan, least, place) > room:
        return []
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if _with_samples(plan, middle, place) <= room else (least, middle - 1)
    return [f"`samples={least}` ({format_bytes(_with_samples(plan, least, place))})"]


def _with_samples(plan: ConversionPlan, samples: int, place: Place) -> int:
    return _needed(replace(plan, calibration=replace(plan.calibration, sequences=samples)), place)


def _both(plan: ConversionPlan, room: int, place: Place) -> list[str]:
    """A cheaper method on less text, where neither is enough alone."""
    for words, cheaper in _cheaper_plans(plan):
        if texts := _less_text(cheaper, room, place):
            return [f"{words} with {texts[0]}"]
    return []
