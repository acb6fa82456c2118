"""How much memory this process may come to hold, within the limits of its container, and how much it has held."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from hcsmoe_hub.machine import ranks

# Where Linux shows control groups, version 2 and version 1.
_GROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
# Where Linux shows the peak of a process, and starts a new one.
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def available_memory(groups: Path = _GROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Bytes of resident memory that this process can reach, what it holds already included.

    Ranks on the same machine share what is free.

    Args:
        groups: Folder of the control groups.
        membership: File that names the groups of this process.
    """
    free = min([int(psutil.virtual_memory().available), *_free_in_groups(groups, membership)])
    return max(free, 0) // ranks.local_size() + int(psutil.Process().memory_info().rss)


def reset_resident_peak() -> None:
    """Begins to measure the peak of resident memory anew, where the system allows it."""
    with suppress(OSError):
        _CLEAR.write_text(_RESET_PEAK, "utf-8")


def resident_peak() -> int:
    """Most resident bytes of this process since ``reset_resident_peak``, or since it began where that has no effect."""
    with suppress(OSError):
        for line in _STATUS.read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _free_in_groups(groups: Path, membership: Path) -> list[int]:
    """What is left in each control group that limits this process."""
    free = []
    for group in _own_groups(groups, membership):
        for limit, usage in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            most, used = _number(group / limit), _number(group / usage)
            if most is not None and used is not None:
                free.append(most - used + _cached(group / "memory.stat"))
    return free


def _own_groups(groups: Path, membership: Path) -> list[Path]:
    """Folders of the groups that this process is in, each with all that contain it."""
    try:
        lines = membership.read_text("utf-8").splitlines()
    except OSError:
        return []
    found: dict[Path, None] = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = groups / "memory" if "memory" in controllers.split(",") else groups
        folder = root / path.lstrip("/")
        found |= dict.fromkeys([folder, *(parent for parent in folder.parents if parent.is_relative_to(root))])
    return list(found)


def _number(file: Path) -> int | None:
    """The number in a file; ``None`` if there is none, or no limit."""
    try:
        content = file.read_text("utf-8").strip()
    except OSError:
        return None
    return int(content) if content.isdecimal() else None


def _cached(file: Path) -> int:
    """Bytes of files in memory, which the system gives up when memory is needed."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))
