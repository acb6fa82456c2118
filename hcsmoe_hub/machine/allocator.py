"""Keeps the resident memory of a long run close to what is in use.

The C library's heap grows with every layer, because the gaps that one layer's tensors leave seldom fit the next one's.
Large tensors are therefore mapped one by one, so that freeing them returns their pages, and the heap is trimmed
between layers. Both calls exist only in glibc; elsewhere they do nothing.
"""

import ctypes
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

# From malloc.h: parameters of mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# Above the buffers that each micro-batch allocates again, which are cheaper to keep; below a layer's weights.
_MAPPED_BYTES = 16_000_000
_KEPT_BYTES = 64_000_000
# Below the size of one huge page there is nothing to gain.
_HUGE_PAGE_BYTES = 2 << 20


def _libc_function(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None)


def map_large_tensors() -> None:
    """Makes the allocator map large tensors, for the rest of the process."""
    mallopt = _libc_function("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


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
