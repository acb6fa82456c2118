"""The file in which measured rates of this machine are kept, so that no plan measures them twice."""

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError

from hcsmoe_hub.machine import accelerator

_FILE = "rates.json"
T = TypeVar("T")


def rates_path() -> Path:
    """Where rates are kept: in ``HCSMOE_HOME``, otherwise in ``hcsmoe`` below ``XDG_CACHE_HOME`` or ``~/.cache``."""
    home = os.environ.get("HCSMOE_HOME")
    if home:
        return Path(home) / _FILE
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "hcsmoe" / _FILE


def device_key(device: torch.device) -> str:
    """What the rates of a device depend on: the machine, its processor and threads, torch, and the device itself."""
    parts = [platform.node(), _processor(), f"{torch.get_num_threads()} threads", f"torch {torch.__version__}"]
    return " | ".join([*parts, accelerator.name(device)])


def disk_key(folder: Path) -> str:
    """What the rates of a disk depend on: the machine, and where the disk is mounted."""
    place = folder.resolve()
    mount = next(path for path in (place, *place.parents) if path.is_mount())
    return f"{platform.node()} | disk {mount}"


def _processor() -> str:
    try:
        name = str(torch.cpu.get_capabilities().get("cpu_name", ""))
    except RuntimeError:
        name = ""
    return name or platform.processor() or platform.machine()


def recall(key: str, kind: type[T]) -> T | None:
    """Rates that were kept; ``None`` if there are none, or they are not those of this version.

    Args:
        key: Says whose they are.
        kind: Their dataclass.
    """
    try:
        return TypeAdapter(kind).validate_python(_content().get(key))
    except ValidationError:
        return None


def keep(key: str, rates: Any) -> None:
    """Adds rates to the file. Where it cannot be written, they are measured again next time.

    Args:
        key: Says whose they are.
        rates: A dataclass.
    """
    file = rates_path()
    content = {**_content(), key: asdict(rates)}
    part = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        # Another process may be reading or writing it.
        part.replace(file)
    except OSError:
        return


def _content() -> dict[str, Any]:
    """What the file holds; nothing if it cannot be read or is something else."""
    try:
        content = json.loads(rates_path().read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
