"""Whether a conversion, or anything else, has room on the disks that it writes to."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hcsmoe_hub.checkpoint.unfinished import progress
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
    total = needed.cache_bytes + needed.disk_bytes + needed.checkpoint_bytes + needed.statistics_bytes
    addition = f", or add `low_disk=True`, which needs {format_bytes(total)}" if is_enough else ""
    return [OutputError(message, hint=hint + addition) for message, hint in found]


@dataclass(frozen=True, slots=True)
class Load:
    """What goes to a disk.

    Attributes:
        what: It, in words, in the singular.
        place: An existing folder on the disk.
        size: Bytes that it needs.
        option: Names another disk.
        replaced: Bytes of what it replaces, which stays until it is complete.
        saving: What makes it smaller, as an imperative; empty if nothing does.
    """

    what: str
    place: Path
    size: int
    option: str
    replaced: int = 0
    saving: str = ""


def lacking(loads: Sequence[Load]) -> list[tuple[str, str]]:
    """Message and hint of everything that does not fit, one for each disk."""
    disks = dict[int, list[Load]]()
    for load in loads:
        disks.setdefault(disk_of(load.place), []).append(load)
    return [_problem(each) for each in disks.values() if _free(each) < sum(load.size for load in each)]


def stored_bytes(folder: Path) -> int:
    """Bytes that the files below a folder take on the disk; unwritten parts of shards take none."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def shard_bytes(folder: Path) -> int:
    """Bytes of the shards in a folder; 0 if it does not exist."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _problems(plan: ConversionPlan, needs: Needs) -> list[tuple[str, str]]:
    """Message and hint of everything of a conversion that does not fit, one for each disk."""
    cache, file = plan.model.source.cache, plan.options.statistics
    loads = []
    if cache is not None and needs.cache_bytes:
        loads.append(Load("the download", existing_part(cache), needs.cache_bytes, "`cache_dir`"))
    # What an interrupted run has written is either taken over or removed.
    missing = max(needs.disk_bytes - stored_bytes(plan.staging), 0)
    missing += max(needs.checkpoint_bytes - stored_bytes(progress(plan.output)), 0)
    old = shard_bytes(plan.output) if plan.options.overwrite else 0
    loads.append(Load("the result", existing_part(plan.output), missing, "`output`", replaced=old))
    if file is not None and needs.statistics_bytes:
        # Nearly all of the statistics are hidden states.
        saving = "add `keep_states=False`" if plan.keeps_states else ""
        place, size = existing_part(file.parent), needs.statistics_bytes
        loads.append(Load("the statistics file", place, size, "`statistics`", saving=saving))
    return lacking(loads)


def _free(loads: Sequence[Load]) -> int:
    return shutil.disk_usage(loads[0].place).free


def _problem(loads: Sequence[Load]) -> tuple[str, str]:
    """Message and hint where one disk does not hold what goes there."""
    verbs = [" needs", *[""] * (len(loads) - 1)]
    sizes = [f"{load.what}{verb} {format_bytes(load.size)}" for load, verb in zip(loads, verbs, strict=True)]
    places = list(dict.fromkeys(str(load.place) for load in loads))
    place = places[0] if len(places) == 1 else f"the disk of {format_list(places)}"
    choices = format_list(list(dict.fromkeys(load.option for load in reversed(loads))), "or")
    savings = "".join(f", or {load.saving}" for load in loads if load.saving)
    message = f"{format_list(sizes)}, but {place} has {format_bytes(_free(loads))} free."
    old = sum(load.replaced for load in loads)
    is_enough = old and _free(loads) + old >= sum(load.size for load in loads)
    deleting = ", or delete the old result first, which otherwise stays until the new one is complete"
    return message, f"choose another disk with {choices}{savings}{deleting if is_enough else ''}"
