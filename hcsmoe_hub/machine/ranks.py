"""The processes that share one conversion: how many there are, and how they bring together what each has found.

A conversion in a single process needs no process group: every function then returns what it was given.

All ranks call the same functions in the same order; whatever differs between them is agreed on first.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hcsmoe_hub.errors import HcsmoeError
from hcsmoe_hub.machine import collectives

T = TypeVar("T")

# Bytes of a tensor that are compared as one row.
_DIGEST_BYTES = 2048


class RankLostError(HcsmoeError):
    """Another rank has ended, so that this one cannot go on."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"{reason}, so the conversion has ended on all ranks.",
            hint="look for a message of that rank or for a process that was killed, and start all ranks again",
        )


def is_shared() -> bool:
    """Whether several processes share the conversion."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_shared() else 1


def number() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if is_shared() else 0


def is_first() -> bool:
    """Whether this process reports and writes what there is only one of."""
    return number() == 0


def local_number() -> int:
    """Which of the processes of this machine this is, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_shared() else 0


def local_size() -> int:
    """Processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_shared() else 1


def block(rows: int) -> slice:
    """The contiguous block of some rows that is this rank's, about as large as any other."""
    return slice(rows * number() // size(), rows * (number() + 1) // size())


@contextmanager
def _talking() -> Iterator[None]:
    """Turns the failure of a collective into that of a rank: for gloo, torch raises a plain RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise RankLostError("the connection to another rank is lost") from error


def add_up(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in place and in its own dtype; the same bits on every rank.

    Ranks may hold theirs on different devices, here and in all that follows.
    """
    if is_shared():
        with _talking():
            collectives.add_up(values)
    return values


def joined(rows: Tensor) -> Tensor:
    """The rows of all ranks, one rank after the other; ranks may hold different numbers of rows."""
    if not is_shared():
        return rows
    counts, shape = _counts(len(rows), rows.device), rows.shape[1:]
    # As bytes: backends do not know every dtype.
    padded = rows.new_zeros((max(counts), shape.numel()))
    padded[: len(rows)] = rows.reshape(len(rows), shape.numel())
    with _talking():
        found = collectives.gather(padded.view(-1).view(torch.uint8))
    parts = [each.view(rows.dtype).view(padded.shape)[:count] for each, count in zip(found, counts, strict=True)]
    return torch.cat(parts).view(sum(counts), *shape)


def place(rows: int, device: torch.device) -> tuple[int, int]:
    """Where this rank's rows begin among those of all ranks, and how many there are in all."""
    if not is_shared():
        return 0, rows
    counts = _counts(rows, device)
    return sum(counts[: number()]), sum(counts)


def every(value: T) -> list[T]:
    """What each rank has, in their order; any object that can be pickled."""
    if not is_shared():
        return [value]
    found: list[T] = [value] * size()
    with _talking():
        dist.all_gather_object(found, value)
    return found


def all_agree(holds: bool) -> bool:
    """Whether something holds on every rank."""
    if not is_shared():
        return holds
    return int(add_up(torch.tensor([int(holds)]))) == size()


def from_first(value: T) -> T:
    """What the first rank has; any object that can be pickled."""
    if not is_shared():
        return value
    box = [value]
    with _talking():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def alike(action: Callable[[], T]) -> T:
    """Does something on every rank that may be refused on some of them.

    Returns:
        What it returned on this rank.

    Raises:
        HcsmoeError: The first refusal of any rank, on all of them.
    """
    if not is_shared():
        return action()
    error: HcsmoeError | None = None
    try:
        result = action()
    except RankLostError:
        raise
    except HcsmoeError as refusal:
        error = refusal
    refusals = [each for each in every(None if error is None else _portable(error)) if each is not None]
    if error is not None and refusals[0] == _portable(error):
        raise error
    if refusals:
        message, hint, option = refusals[0]
        raise HcsmoeError(message, hint=hint, option=option)
    return result


def first(action: Callable[[], T]) -> T:
    """Does something on the first rank only.

    Returns:
        What it returned there, on every rank; any object that can be pickled.

    Raises:
        HcsmoeError: If it was refused there, on all ranks.
    """
    if not is_shared():
        return action()
    made = alike(lambda: [action()] if is_first() else [])
    # The first rank keeps its own, parts of which others may hold as well.
    sent = from_first(made)
    return (made or sent)[0]


def on_first(action: Callable[[], T]) -> T | None:
    """Does something on the first rank only, whose result stays there.

    Returns:
        What it returned; ``None`` on other ranks.

    Raises:
        HcsmoeError: If it was refused there, on all ranks.
    """
    return alike(lambda: action() if is_first() else None)


def settle(tensors: Mapping[str, Tensor]) -> None:
    """Makes tensors equal that all ranks have computed from the same numbers, in place.

    On unlike machines, or on accelerators that add in any order, a near-tie may have fallen differently. Then the first
    rank's values count.

    Args:
        tensors: By name, the same names on every rank.
    """
    if not is_shared():
        return
    found = every({name: _digest(values) for name, values in tensors.items()})
    for name, values in tensors.items():
        if any(each[name] != found[0][name] for each in found):
            with _talking():
                collectives.copy_from_first(values)


def _portable(error: HcsmoeError) -> tuple[str, str, str | None]:
    return error.message, error.hint, error.option


def _digest(values: Tensor) -> tuple[int, ...]:
    """Sums over the bytes of a tensor, which differ if its rows, or numbers in a row, change places."""
    whole = values.detach().contiguous().view(-1).view(torch.uint8)
    length = len(whole) // _DIGEST_BYTES * _DIGEST_BYTES
    words, rest = whole[:length].view(torch.int64).view(-1, _DIGEST_BYTES // 8), whole[length:].to(torch.int64)
    sums = (words.sum(0), words.sum(1), rest)
    return tuple(int((each * torch.arange(1, len(each) + 1, device=each.device)).sum()) for each in sums)


def _counts(rows: int, device: torch.device) -> list[int]:
    own = torch.tensor([rows], device=device)
    with _talking():
        found = collectives.gather(own.view(torch.uint8))
    return [int(each.view(torch.int64)) for each in found]


def differing(items: Sequence[Mapping[str, str]]) -> tuple[int, str] | None:
    """The first rank that differs from the first one, and in which item; ``None`` if none does.

    Args:
        items: What each rank has, as ``every`` returns it.
    """
    for rank, own in enumerate(items):
        for name, value in items[0].items():
            if own.get(name) != value:
                return rank, name
    return None
