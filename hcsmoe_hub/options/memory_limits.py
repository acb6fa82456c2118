"""Limits on memory, by place: of the host, of every accelerator or of a certain one."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from hcsmoe_hub.options.checks import WrongValue, at_least, read_integer, read_size

HOST = "cpu"
_DEVICES = "cuda"
# Bytes as a number or as text such as 24GB; for the host, or by place as in accelerate's ``max_memory``.
Bytes: TypeAlias = int | str
_PLACE = re.compile(r"cpu|cuda(:\d+)?")


def read_limits(value: "Bytes | Mapping[Any, Bytes]") -> dict[str, int]:
    """Limits by place: ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        WrongValue: If a place or a size is not one.
    """
    given = value if isinstance(value, Mapping) else {HOST: value}
    if not given:
        raise WrongValue("it names no limit.")
    return {_read_place(place): _read_bytes(size) for place, size in given.items()}


def read_limit(text: str) -> dict[str, int]:
    """One limit as the command line takes it: ``24GB``, ``cuda=40GB`` or ``cuda:1=40GB``.

    Raises:
        WrongValue: If the place or the size is not one.
    """
    place, separator, size = text.rpartition("=")
    return read_limits({place if separator else HOST: size})


def limit_of(limits: "MaxMemory | None", index: int | None) -> int | None:
    """The limit that holds for the host, or for an accelerator; ``None`` if there is none.

    Args:
        limits: As options hold them.
        index: Number of the accelerator, ``None`` for the host.
    """
    if limits is None:
        return None
    found = read_limits(limits)
    return found.get(HOST) if index is None else found.get(f"{_DEVICES}:{index}", found.get(_DEVICES))


def _read_place(place: str | int) -> str:
    """A place, which may be the number of an accelerator."""
    text = f"{_DEVICES}:{place}" if isinstance(place, int) else str(place).strip()
    if not _PLACE.fullmatch(text):
        raise WrongValue(f"'{place}' is not a place that has memory; write cpu, cuda or cuda:N.")
    return text


def _read_bytes(size: Bytes) -> int:
    return read_size(size) if isinstance(size, str) else at_least(1)(read_integer(size))


# Mappings are invariant in their keys, which are names or numbers.
MaxMemory: TypeAlias = Annotated[Mapping[Any, int | str] | str | int, read_limits]
