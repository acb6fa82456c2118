"""Recognises memory that has run out among other failures, and explains it in one message.

Libraries report it with many types and texts. Code that can go on with a smaller piece asks ``is_out_of_memory``; what
nothing has handled becomes an ``OutOfMemoryError`` at the outermost level.
"""

import errno
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch

from hcsmoe_hub.errors import HcsmoeError, OutOfMemoryError
from hcsmoe_hub.machine import accelerator
from hcsmoe_hub.machine.units import format_bytes, format_list

# Of allocators, of the driver, and of libraries that ask it for memory; transformers quotes them in its own errors.
_ON_DEVICE = (
    "CUDA out of memory",
    "HIP out of memory",
    "XPU out of memory",
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "HIP error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "torch.OutOfMemoryError",
)
_ON_HOST = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "std::bad_alloc")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) ?(?:([KMGT])i?B\b|bytes)", re.IGNORECASE)


def says_out_of_memory(text: str) -> bool:
    """Whether the text of an error, or a traceback inside it, is about memory that has run out."""
    return any(words in text for words in (*_ON_DEVICE, *_ON_HOST)) or "MemoryError" in text


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the host or of an accelerator has run out, so that a smaller piece of the work may succeed."""
    if isinstance(error, OutOfMemoryError | MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, Exception) and says_out_of_memory(str(error))


@contextmanager
def explaining(device: torch.device, *, where: Callable[[], str], helps: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Turns memory that runs out inside a ``with`` block into one message.

    Args:
        device: Where layers run.
        where: Asked for what was being done, ``in layer 3`` say; empty if that is unknown.
        helps: Asked for what takes less memory, best first, each as part of a sentence: ``fewer `samples```.

    Raises:
        OutOfMemoryError: In place of whatever else says that memory has run out.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError, HcsmoeError) as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        explained = OutOfMemoryError(_message(error, device, where()), hint=f"use {format_list(helps(), 'or')}")
        # Tensors of the frames that have ended would stay for as long as someone keeps the error.
        traceback.clear_frames(error.__traceback__)
        raise explained from error


def _message(error: Exception, device: torch.device, where: str) -> str:
    on_host = accelerator.is_host(device) or not _is_of_device(error)
    if on_host:
        free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    else:
        free, total = accelerator.free_bytes(device), accelerator.total_bytes(device)
    memory = "memory" if on_host else f"the memory of {device}"
    place = f" {where}" if where else ""
    asked = _asked_bytes(str(error))
    wanted = "" if asked is None else f"{format_bytes(asked)} more were needed, but "
    return f"{memory} ran out{place}: {wanted}{format_bytes(free)} of {format_bytes(total)} are free."


def _asked_bytes(text: str) -> int | None:
    """Bytes that an allocator was asked for, if its error says so."""
    found = _ASKED.search(text)
    return None if found is None else int(float(found[1]) * _UNITS[(found[2] or "").upper()])


def _is_of_device(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _ON_DEVICE)
