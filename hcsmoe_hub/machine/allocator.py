"""Keeps the resident memory of a long run close to what is in use.

The C library's heap grows with every layer, because the gaps that one layer's tensors leave seldom fit the next one's.
Large tensors are therefore mapped one by one, so that freeing them returns their pages, and the heap is trimmed
between layers. Both calls exist only in glibc; elsewhere they do nothing.
"""

import ctypes
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# From malloc.h: parameters of mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# Above the buffers that each micro-batch allocates again, which are cheaper to keep; below a layer's weights.
_MAPPED_BYTES = 16_000_000
_KEPT_BYTES = 64_000_000
# What glibc's own thresholds grow to in a process that frees large blocks; they cannot be made to grow again.
_USUAL_MAPPED_BYTES = 32 << 20
_USUAL_KEPT_BYTES = 2 * _USUAL_MAPPED_BYTES
# Smaller than one huge page there is nothing to gain.
_HUGE_PAGE_BYTES = 2 << 20


def _libc_function(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None)


@contextmanager
def mapping_large_tensors() -> Iterator[None]:
    """Lets the allocator map large tensors inside a ``with`` block.

    The C library adapts its thresholds as a process goes on, until they are set for the first time. Afterwards they
    are therefore set to the values that it would have reached by itself.
    """
    _set_thresholds(_MAPPED_BYTES, _KEPT_BYTES)
    try:
        yield
    finally:
        _set_thresholds(_USUAL_MAPPED_BYTES, _USUAL_KEPT_BYTES)


def _set_thresholds(mapped: int, kept: int) -> None:
    mallopt = _libc_function("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, mapped)
        mallopt(_TRIM_THRESHOLD, kept)


def return_freed_memory() -> None:
    """Returns freed memory to the system."""
    trim = _libc_function("malloc_trim")
    if trim is not None:
        trim(0)


def mapped_tensor(nbytes: int) -> tuple[Tensor, memoryview]:
    """Fresh anonymous memory that is returned to the system with its last tensor.

    Args:
        nbytes: At least 1.

    Returns:
        A ``[nbytes]`` uint8 tensor and a writable view of the same memory.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes > _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8), memoryview(memory)


def bytes_of(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host, to read into or to write from.

    Args:
        values: With at least one element.
    """
    assert values.is_contiguous(), "its bytes lie one behind the other"
    return values.detach().reshape(-1).view(torch.uint8).numpy().data
