"""Whether this machine has room for a conversion: a warning where it is planned, a refusal where it begins."""

import torch

from hcsmoe_hub.errors import HcsmoeError, PlanError
from hcsmoe_hub.machine.device import resolve_device
from hcsmoe_hub.machine.memory import available_memory
from hcsmoe_hub.machine.units import format_bytes
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.disk_space import disk_shortages
from hcsmoe_hub.planning.estimate import Needs, estimate_needs
from hcsmoe_hub.planning.memory import memory_shortage


def check_room(plan: ConversionPlan) -> None:
    """Checks that a conversion which is about to begin has room on the disks and in memory.

    A limit on memory that is above the estimate is the user's word that there is enough.

    Raises:
        OutputError: If the download or the result does not fit on its disk.
        PlanError: If the estimated peak is more than what is available, and no limit says otherwise.
    """
    for shortage in shortages(plan):
        raise shortage


def room_warnings(plan: ConversionPlan) -> list[str]:
    """What a plan must say about a machine that it does not fit, each with what to do."""
    needs = estimate_needs(plan)
    found = [_sentence(shortage) for shortage in shortages(plan)]
    available = available_memory()
    if plan.options.max_memory_bytes is not None and needs.memory_bytes > available:
        found.append(
            f"the conversion needs about {format_bytes(needs.memory_bytes)} of memory, but {format_bytes(available)} "
            "are available; it starts regardless, as `max_memory_bytes` allows that much."
        )
    return found + _device_warnings(plan, needs)


def shortages(plan: ConversionPlan) -> list[HcsmoeError]:
    """Why a conversion that begins now would be refused for want of room; empty if it would not be."""
    needs = estimate_needs(plan)
    found: list[HcsmoeError] = [*disk_shortages(plan, needs)]
    if plan.options.max_memory_bytes is None:
        shortage = memory_shortage(plan, needs, available=available_memory())
        found += [] if shortage is None else [shortage]
    if plan.trains_model:
        found += _training_shortages(plan, needs)
    return found


def _training_shortages(plan: ConversionPlan, needs: Needs) -> list[HcsmoeError]:
    """Why the source and the result cannot be on the accelerator at once; empty if they can, or are not."""
    free = _free_on_device(plan)
    if free is None or needs.device_bytes <= free:
        return []
    device = resolve_device(plan.options.device)
    return [
        PlanError(
            f"`refit='model'` needs about {format_bytes(needs.device_bytes)} on {device} for the source and the result "
            f"at once, but {format_bytes(free)} are free there.",
            hint="use `refit='blocks'`, or `device='cpu'` where memory has room for both",
        )
    ]


def _free_on_device(plan: ConversionPlan) -> int | None:
    """Free bytes of the accelerator; ``None`` if layers do not run on one."""
    device = resolve_device(plan.options.device)
    if device.type != "cuda" or not plan.on_device:
        return None
    return int(torch.cuda.mem_get_info(device)[0])


def _device_warnings(plan: ConversionPlan, needs: Needs) -> list[str]:
    """A warning if a layer is too large for the accelerator, where micro-batches can shrink but layers cannot."""
    free = _free_on_device(plan)
    # What a training needs there is refused instead.
    if free is None or needs.device_bytes <= free or plan.trains_model:
        return []
    device = resolve_device(plan.options.device)
    return [
        f"a layer needs about {format_bytes(needs.device_bytes)} on {device}, but {format_bytes(free)} are free there. "
        "Use `device='cpu'`, or another device."
    ]


def _sentence(error: HcsmoeError) -> str:
    return f"{error.message} {error.hint[0].upper()}{error.hint[1:]}."
