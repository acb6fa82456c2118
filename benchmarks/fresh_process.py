"""Runs ``one_conversion.py`` in a fresh process with one thread, and describes the machine that it runs on."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hcsmoe_hub.machine.versions import installed_versions

_CHILD = Path(__file__).with_name("one_conversion.py")


def run(source: Path, result: Path, words: list[str]) -> dict[str, Any]:
    """Converts a checkpoint, deletes the result, and returns what that took.

    Args:
        source: The checkpoint.
        result: Folder of the result.
        words: Further arguments.
    """
    command = [sys.executable, str(_CHILD), str(source), str(result), *words]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--started", str(time.time())], env=os.environ | threads, stdout=subprocess.PIPE, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    found["result_bytes"] = sum(file.stat().st_size for file in result.glob("*.safetensors"))
    shutil.rmtree(result)
    return found


def cpu_seconds(used: dict[str, float]) -> float:
    """User and system time."""
    return used["user"] + used["system"]


def machine() -> dict[str, Any]:
    """What figures depend on."""
    capabilities = torch.cpu.get_capabilities()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "threads": 1,
        "has_bf16_instructions": any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")),
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), **installed_versions()},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
