"""Which device runs the layers, in which dtype, and how much memory was used."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.machine import accelerator, ranks
from hcsmoe_hub.machine.memory import reset_resident_peak, resident_peak
from hcsmoe_hub.options import Device


def resolve_device(name: str) -> torch.device:
    """Turns ``auto``, ``cpu``, ``cuda`` or ``cuda:1``, as options hold them, into a device of this machine.

    Where ranks share a conversion, each has an accelerator of its own.

    Raises:
        PlanError: If the machine does not have it.
    """
    own = ranks.local_number()
    if name == Device.AUTO:
        return torch.device(accelerator.KIND, own) if accelerator.count() > own else accelerator.HOST
    if name == Device.CPU:
        return torch.device(Device.CPU)
    index = int(name.partition(":")[2] or own)
    count = accelerator.count()
    if index >= count:
        found = f"{count} CUDA devices" if count else "no CUDA device"
        raise PlanError(
            f"`device='{name}'` was requested, but torch finds {found}.", hint="use `device='auto'` or `device='cpu'`"
        )
    return torch.device(accelerator.KIND, index)


def default_batch_tokens(*, on_device: bool) -> int:
    """Tokens per micro-batch: enough that every expert gets a matrix of rows, and an accelerator is kept busy."""
    return 32768 if on_device else 4096


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which a device multiplies bfloat16 weights: float32 where it has no instructions for bfloat16."""
    if not accelerator.is_host(device):
        is_native = accelerator.has_bf16(device)
    else:
        found = torch.cpu.get_capabilities()
        # The last one is the name on ARM.
        is_native = any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if is_native else torch.float32


@contextmanager
def measuring_memory(device: torch.device) -> Iterator[None]:
    """Measures the peaks of memory anew inside a ``with`` block, and gives memory that nothing uses back afterwards.

    Args:
        device: Where layers run.
    """
    reset_resident_peak()
    accelerator.reset_peak(device)
    try:
        yield
    finally:
        accelerator.release_unused(device)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak resident bytes of this process, and peak allocated bytes of the accelerator if there is one."""
    peak = {"process": resident_peak()}
    if not accelerator.is_host(device):
        peak[str(device)] = accelerator.peak_bytes(device)
    return peak
