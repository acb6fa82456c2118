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


def check_disks(plan: ConversionPlan, needs: Needs) -> None:
    """Checks that the download and the result fit, together where they lie on one disk.

    Raises:
        OutputError: If they do not.
    """
    problem = _problem(plan, needs)
    if problem is None:
        return
    message, hint = problem
    if not plan.options.low_disk:
        frugal = replace(plan, options=replace(plan.options, low_disk=True))
        needed = estimate_needs(frugal)
        if _problem(frugal, needed) is None:
            # A pushed result need not stay on the disk; a download never need.
            hint += f", or add `low_disk=True`, which needs {format_bytes(needed.cache_bytes + needed.disk_bytes)}"
    raise OutputError(message, hint=hint)


def _problem(plan: ConversionPlan, needs: Needs) -> tuple[str, str] | None:
    """Message and hint if something does not fit."""
    output, cache = existing_part(plan.output), plan.model.source.cache
    if cache is not None and needs.cache_bytes:
        cache = existing_part(cache)
        if disk_of(cache) != disk_of(output):
            free = shutil.disk_usage(cache).free
            if free < needs.cache_bytes:
                return (
                    f"the download needs {format_bytes(needs.cache_bytes)}, but {cache} has {format_bytes(free)} free.",
                    "choose another disk with `cache_dir`",
                )
        else:
            free, needed = shutil.disk_usage(output).free, needs.cache_bytes + needs.disk_bytes
            if free < needed:
                return (
                    f"the download needs {format_bytes(needs.cache_bytes)} and the result "
                    f"{format_bytes(needs.disk_bytes)}, but the disk of {cache} and {output} has "
                    f"{format_bytes(free)} free.",
                    "choose another disk with `output` or `cache_dir`",
                )
    free = shutil.disk_usage(output).free
    if free < needs.disk_bytes:
        return (
            f"the result needs {format_bytes(needs.disk_bytes)}, but {output} has {format_bytes(free)} free.",
            "choose another disk with `output`",
        )
    return None
