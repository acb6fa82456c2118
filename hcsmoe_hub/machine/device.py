"""Which device runs the layers, how fast it multiplies, and how much memory was used."""

import resource
import sys
import time

import torch
from torch import Tensor

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.options import Device

# Rows and columns of the matrices that speed is measured with, and the shortest time that is long enough.
_PROBE_SIZES = (128, 256, 512, 1024, 2048, 4096, 8192)
_PROBE_SECONDS = 0.002


def resolve_device(name: str) -> torch.device:
    """Turns ``auto``, ``cpu``, ``cuda`` or ``cuda:1``, as options hold them, into a device of this machine.

    Raises:
        PlanError: If there is no such device.
    """
    if name == Device.AUTO:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == Device.CPU:
        return torch.device(Device.CPU)
    index = int(name.partition(":")[2] or 0)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        found = f"{count} CUDA devices" if count else "no CUDA device"
        raise PlanError(
            f"`device='{name}'` was requested, but torch finds {found}.", hint="use `device='auto'` or `device='cpu'`"
        )
    return torch.device(f"cuda:{index}")


def default_batch_tokens(*, on_device: bool) -> int:
    """Tokens per micro-batch: enough that every expert gets a matrix of rows; more only take memory."""
    return 8192 if on_device else 4096


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which a device multiplies bfloat16 weights: float32 where it has no instructions for bfloat16."""
    if device.type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        # The last one is the name on ARM.
        is_native = any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if is_native else torch.float32


def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of matrix products, from the first size that takes long enough to time.

    Processors without instructions for a dtype are a hundred times slower than others, so no one size suits all.
    """
    for size in _PROBE_SIZES:
        matrix = torch.ones(size, size, dtype=dtype, device=device)
        elapsed = min(_seconds(matrix) for _ in range(2))
        if elapsed >= _PROBE_SECONDS:
            break
    return float(2 * size**3 / elapsed)


def _seconds(matrix: Tensor) -> float:
    start = time.perf_counter()
    # Reading one element waits for the device.
    (matrix @ matrix)[0, 0].item()
    return time.perf_counter() - start


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak resident bytes of this process, and peak allocated bytes of the accelerator if there is one."""
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak[str(device)] = torch.cuda.max_memory_allocated(device)
    return peak
