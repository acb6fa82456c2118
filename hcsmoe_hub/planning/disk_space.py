"""Whether a conversion has room on the disks that it writes to."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hcsmoe_hub.errors import OutputError
from hcsmoe_hub.machine.units import format_bytes, format_list
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.estimate import Needs, estimate_needs


def existing_part(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def disk_of(path: Path) -> int:
    """Number of the disk that an existing path lies on."""
    return path.stat().st_dev


def disk_shortages(plan: ConversionPlan, needs: Needs) -> list[OutputError]:
    """What is wrong if download, result and statistics do not fit, together where they share a disk; each disk once."""
    found = _problems(plan, needs)
    if not found or plan.options.low_disk:
        return [OutputError(message, hint=hint) for message, hint in found]
    frugal = replace(plan, options=replace(plan.options, low_disk=True))
    needed = estimate_needs(frugal)
    # A pushed result need not stay on the disk; a download never need.
    is_enough = not _problems(frugal, needed)
    total = format_bytes(needed.cache_bytes + needed.disk_bytes + needed.statistics_bytes)
    addition = f", or add `low_disk=True`, which needs {total}" if is_enough else ""
    return [OutputError(message, hint=hint + addition) for message, hint in found]


_STATISTICS = "`statistics`"


@dataclass(frozen=True, slots=True)
class _Load:
    """What goes to a disk.

    Attributes:
        what: It, in words.
        place: An existing folder on the disk.
        size: Bytes.
        option: Names another disk.
    """

    what: str
    place: Path
    size: int
    option: str


def _problems(plan: ConversionPlan, needs: Needs) -> list[tuple[str, str]]:
    """Message and hint of everything that does not fit, one for each disk."""
    cache, file = plan.model.source.cache, plan.options.statistics
    loads = []
    if cache is not None and needs.cache_bytes:
        loads.append(_Load("the download", existing_part(cache), needs.cache_bytes, "`cache_dir`"))
    loads.append(_Load("the result", existing_part(plan.output), needs.disk_bytes, "`output`"))
    if file is not None and needs.statistics_bytes:
        loads.append(_Load("the statistics file", existing_part(file.parent), needs.statistics_bytes, _STATISTICS))
    disks = dict[int, list[_Load]]()
    for load in loads:
        disks.setdefault(disk_of(load.place), []).append(load)
    states = plan.keeps_states
    return [
        _problem(loads, keeps_states=states)
        for loads in disks.values()
        if _free(loads) < sum(load.size for load in loads)
    ]


def _free(loads: Sequence[_Load]) -> int:
    return shutil.disk_usage(loads[0].place).free


def _problem(loads: Sequence[_Load], *, keeps_states: bool) -> tuple[str, str]:
    """Message and hint where one disk does not hold what goes there."""
    verbs = [" needs", *[""] * (len(loads) - 1)]
    sizes = [f"{load.what}{verb} {format_bytes(load.size)}" for load, verb in zip(loads, verbs, strict=True)]
    places = list(dict.fromkeys(str(load.place) for load in loads))
    place = places[0] if len(loads) == 1 else f"the disk of {format_list(places)}"
    choices = format_list([load.option for load in reversed(loads)], "or")
    # Nearly all of the statistics are hidden states.
    has_states = keeps_states and any(load.option == _STATISTICS for load in loads)
    without = ", or add `keep_states=False`" if has_states else ""
    message = f"{format_list(sizes)}, but {place} has {format_bytes(_free(loads))} free."
    return message, f"choose another disk with {choices}{without}"
