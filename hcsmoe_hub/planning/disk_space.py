"""Whether a conversion has room on the disks that it writes to."""

import shutil
from dataclasses import replace
from pathlib import Path

from hcsmoe_hub.errors import OutputError
from hcsmoe_hub.machine.units import format_bytes
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.estimate import Needs, estimate_needs


def existing_part(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def disk_of(path: Path) -> int:
    """Number of the disk that an existing path lies on."""
    return path.stat().st_dev


def disk_shortages(plan: ConversionPlan, needs: Needs) -> list[OutputError]:
    """What is wrong if the download and the result do not fit, together where they lie on one disk; each disk once."""
    found = _problems(plan, needs)
    if not found or plan.options.low_disk:
        return [OutputError(message, hint=hint) for message, hint in found]
    frugal = replace(plan, options=replace(plan.options, low_disk=True))
    needed = estimate_needs(frugal)
    # A pushed result need not stay on the disk; a download never need.
    is_enough = not _problems(frugal, needed)
    total = format_bytes(needed.cache_bytes + needed.disk_bytes)
    addition = f", or add `low_disk=True`, which needs {total}" if is_enough else ""
    return [OutputError(message, hint=hint + addition) for message, hint in found]


def _problems(plan: ConversionPlan, needs: Needs) -> list[tuple[str, str]]:
    """Message and hint of everything that does not fit."""
    output, cache, found = existing_part(plan.output), plan.model.source.cache, list[tuple[str, str]]()
    free, download, result = shutil.disk_usage(output).free, needs.cache_bytes, needs.disk_bytes
    if cache is not None and download:
        cache = existing_part(cache)
        if disk_of(cache) == disk_of(output):
            if free < download + result:
                message = (
                    f"the download needs {format_bytes(download)} and the result {format_bytes(result)}, but the disk "
                    f"of {cache} and {output} has {format_bytes(free)} free."
                )
                found.append((message, "choose another disk with `output` or `cache_dir`"))
            return found
        room = shutil.disk_usage(cache).free
        if room < download:
            message = f"the download needs {format_bytes(download)}, but {cache} has {format_bytes(room)} free."
            found.append((message, "choose another disk with `cache_dir`"))
    if free < result:
        message = f"the result needs {format_bytes(result)}, but {output} has {format_bytes(free)} free."
        found.append((message, "choose another disk with `output`"))
    return found
