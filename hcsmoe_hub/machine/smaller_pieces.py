"""Work that goes on in smaller pieces, or elsewhere, when memory has run out."""

import gc
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from hcsmoe_hub.machine import accelerator
from hcsmoe_hub.machine.out_of_memory import is_out_of_memory

WayT = TypeVar("WayT")
ResultT = TypeVar("ResultT")


def first_that_fits(attempt: Callable[[WayT], ResultT], ways: Sequence[WayT], device: torch.device) -> ResultT:
    """Tries ways of doing the same until one fits into memory.

    What an attempt has allocated is given back before the next one. Ranks do not wait for each other here, so an
    attempt must not bring anything together with them.

    Args:
        attempt: Does the work from its beginning; leaves nothing changed if memory runs out.
        ways: The fastest first, the one that takes least memory last; at least one.
        device: Whose memory is given back.

    Raises:
        Exception: What the last attempt raised, and whatever is not about memory.
    """
    for way in ways[:-1]:
        try:
            return attempt(way)
        except (RuntimeError, MemoryError) as error:
            give_back(error, device)
    return attempt(ways[-1])


def give_back(error: Exception, device: torch.device) -> None:
    """Releases what a failed attempt has left in memory.

    Args:
        error: What it raised.
        device: Where the attempt was made.

    Raises:
        Exception: The error itself, if it is not about memory.
    """
    if not is_out_of_memory(error):
        raise error
    # The frames of the error hold the tensors of the attempt.
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = None
    gc.collect()
    accelerator.release_unused(device)


def halves(size: int, least: int) -> Iterator[int]:
    """A size, its half, the half of that and so on; the last one is ``least`` or just above it."""
    yield size
    while size // 2 >= least:
        size //= 2
        yield size


def and_host(device: torch.device) -> list[torch.device]:
    """A device, and the host where that is another one."""
    return [device] if accelerator.is_host(device) else [device, accelerator.HOST]
