"""Whether this machine has room for a conversion: a warning where it is planned, a refusal where it begins."""

from dataclasses import replace

from hcsmoe_hub.checkpoint.unfinished import is_complete
from hcsmoe_hub.errors import HcsmoeError
from hcsmoe_hub.machine import accelerator
from hcsmoe_hub.machine.device import resolve_device
from hcsmoe_hub.machine.memory import available_memory
from hcsmoe_hub.machine.units import format_bytes
from hcsmoe_hub.options.memory_limits import MaxMemory, limit_of
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.disk_space import disk_shortages
from hcsmoe_hub.planning.estimate import estimate_needs
from hcsmoe_hub.planning.memory import device_shortage, memory_shortage
from hcsmoe_hub.planning.placement import placed


def device_room(device: str, limits: MaxMemory | None) -> int | None:
    """Bytes of the accelerator that layers may use: the limit that was set, or what is free; ``None`` on the host.

    Args:
        device: Where layers run, as options name it.
        limits: Limits on memory, as options have them.

    Raises:
        PlanError: If the machine does not have it.
    """
    found = resolve_device(device)
    if accelerator.is_host(found):
        return None
    limit = limit_of(limits, found.index)
    return accelerator.free_bytes(found) if limit is None else limit


def refreshed(plan: ConversionPlan) -> ConversionPlan:
    """The same plan with everything where it fits now: other programs may have taken or freed memory meanwhile."""
    if not plan.on_device:
        return plan
    return placed(replace(plan, device_room=device_room(plan.options.device, plan.options.max_memory)))


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
    found = [sentence(shortage) for shortage in shortages(plan)]
    available = available_memory()
    if limit_of(plan.options.max_memory, None) is not None and needs.memory_bytes > available:
        found.append(
            f"the conversion needs about {format_bytes(needs.memory_bytes)} of memory, but {format_bytes(available)} "
            "are available; it starts regardless, as `max_memory` allows that much."
        )
    return found


def shortages(plan: ConversionPlan) -> list[HcsmoeError]:
    """Why a conversion that begins now would be refused for want of room; empty if it would not be."""
    if is_complete(plan.output) and not (plan.options.restart or plan.options.overwrite):
        # The result is there: what is left to do is to move or to push it.
        return []
    needs = estimate_needs(plan)
    found: list[HcsmoeError | None] = [*disk_shortages(plan, needs)]
    if limit_of(plan.options.max_memory, None) is None:
        found.append(memory_shortage(plan, needs, available=available_memory()))
    found.append(device_shortage(plan, needs))
    return [shortage for shortage in found if shortage is not None]


def sentence(error: HcsmoeError) -> str:
    """A refusal as a warning, with what to do."""
    return f"{error.message} {error.hint[0].upper()}{error.hint[1:]}."
