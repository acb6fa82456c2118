"""Turns words of the command line into values; a word that is unknown is answered with the known ones."""

import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from enum import StrEnum
from typing import TypeVar

import typer

from hcsmoe_hub.options import Device

Choice = TypeVar("Choice", bound=StrEnum)

SIZE_UNITS: Mapping[str, int] = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# What the published code calls a value that has another name here.
REFERENCE_NAMES: Mapping[str, str] = {"freq": "frequency"}
# People say GPU; torch says cuda.
DEVICE_SYNONYMS: Mapping[str, str] = {"gpu": Device.CUDA}


def unknown_value(word: str, known: Iterable[str], *, meant: str | None = None) -> typer.BadParameter:
    """A usage error that lists the known values and, if one is near, suggests it.

    Args:
        word: What was typed.
        known: Every value that would have been accepted.
        meant: The value to suggest; ``None`` looks for the nearest one.
    """
    values = [str(value) for value in known]
    near = [meant] if meant is not None else get_close_matches(word.lower(), values, n=1)
    suggestion = f"; did you mean '{near[0]}'?" if near else "."
    return typer.BadParameter(f"'{word}' is unknown{suggestion} Known values: {', '.join(values)}.")


def choice(kind: type[Choice]) -> Callable[[str], Choice]:
    """A parser for the values of an enum."""

    def parse(word: str) -> Choice:
        word = REFERENCE_NAMES.get(word, word)
        if word not in set(kind):
            raise unknown_value(word, kind)
        return kind(word)

    return parse


def parse_device(word: str) -> str:
    """Accepts ``auto``, ``cpu``, ``cuda`` and ``cuda:1``; whether the machine has it is decided later."""
    if word in set(Device) or re.fullmatch(r"cuda:\d+", word):
        return word
    meant = DEVICE_SYNONYMS.get(word.lower())
    raise unknown_value(word, (*Device, "cuda:N"), meant=meant)


def parse_size(text: str) -> int:
    """Bytes of a decimal size such as ``24GB`` or ``1.5 tb``.

    Raises:
        typer.BadParameter: If it is no size, or zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]{2})\s*", text)
    unit = SIZE_UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not float(match[1]):
        raise typer.BadParameter(f"'{text}' is no size; write a number and {', '.join(SIZE_UNITS)}, such as 5GB.")
    return int(float(match[1]) * unit)


def parse_shard_size(text: str) -> str:
    """Checks a shard size; the library takes it as it was written."""
    parse_size(text)
    return "".join(text.split()).upper()
