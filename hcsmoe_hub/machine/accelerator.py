"""The accelerator of this machine through torch's own interface to it: memory, streams, pinned buffers.

``KIND`` is the only place that names one. Everything else asks whether a device is the host.
"""

from typing import Any

import torch

# The kind of accelerator that layers run on. Others lack float64, or have never been tried.
KIND = "cuda"
HOST = torch.device("cpu")


def is_host(device: torch.device) -> bool:
    """Whether tensors on a device are in the memory of the process."""
    return device.type == "cpu"


def count() -> int:
    """Accelerators that torch finds."""
    module = torch.get_device_module(KIND)
    return int(module.device_count()) if module.is_available() else 0


def _module(device: torch.device) -> Any:
    """What torch offers for a kind of device, ``torch.cuda`` say."""
    return torch.get_device_module(device.type)


def streams(device: torch.device) -> Any:
    """What torch offers for the streams of a device; ``None`` for the host, and for a device without any."""
    # Only the device's own module says whether it has streams.
    return None if is_host(device) or not hasattr(_module(device), "Stream") else _module(device)


def wait(device: torch.device) -> None:
    """Waits until a device has done all that it was asked for; the host has."""
    if not is_host(device):
        _module(device).synchronize(device)


def place(*, on_device: bool) -> torch.device:
    """The first accelerator or the host, for what depends on the kind only."""
    return torch.device(KIND, 0) if on_device else HOST


def has_bf16(device: torch.device) -> bool:
    """Whether an accelerator has instructions for bfloat16."""
    return bool(_module(device).is_bf16_supported(including_emulation=False))


def free_bytes(device: torch.device) -> int:
    """Bytes of an accelerator that this process can still use: what is free, and what its allocator holds unused."""
    module = _module(device)
    unused = module.memory_reserved(device) - module.memory_allocated(device)
    # Less than nothing is free where what may be used was lowered.
    return max(0, int(module.mem_get_info(device)[0] + unused))


def total_bytes(device: torch.device) -> int:
    """Bytes of an accelerator's memory."""
    return int(_module(device).mem_get_info(device)[1])


def peak_bytes(device: torch.device) -> int:
    """The most that tensors took on an accelerator since ``reset_peak``."""
    return int(_module(device).max_memory_allocated(device))


def reset_peak(device: torch.device) -> None:
    """Begins to measure the peak anew."""
    if not is_host(device):
        _module(device).reset_peak_memory_stats(device)


def release_unused(device: torch.device) -> None:
    """Gives memory that the allocator holds unused back to the accelerator."""
    if not is_host(device):
        _module(device).empty_cache()


def name(device: torch.device) -> str:
    """What a device is called: the model of an accelerator, or ``cpu``."""
    return "cpu" if is_host(device) else str(_module(device).get_device_name(device))
