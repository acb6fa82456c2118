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
# What the published code, or the field, calls a value that has another name here; a kind of value takes those it has.
REFERENCE_NAMES: Mapping[str, tuple[str, ...]] = {
    "hirarchical": ("hierarchical",),
    "hierarchical-dynamic": ("hierarchical",),
    "hc": ("hierarchical",),
    "k-means": ("kmeans",),
    "kmeans++": ("kmeans", "k-means++"),
    "fcm": ("fuzzy",),
    "soft": ("fuzzy",),
    "freq": ("frequency",),
    "eo": ("expert-output",),
    "rl": ("router-logits",),
    "rw": ("router-weight",),
    "kl": ("kl-divergence",),
    "no": ("center", "none"),
    "weighted": ("average", "dominant"),
    "fix-dom-same": ("fix-dom",),
    "act": ("activation",),
    "act+weight": ("activation+weight",),
    "weight+act": ("activation+weight",),
    "weight+activation": ("activation+weight",),
}
# People say GPU; torch says cuda.
DEVICE_SYNONYMS: Mapping[str, tuple[str, ...]] = {"gpu": (Device.CUDA,)}


def unknown_value(word: str, known: Iterable[str], *, meant: Iterable[str] = ()) -> typer.BadParameter:
    """A usage error that lists the known values and, if one is near, suggests it.

    Args:
        word: What was typed.
        known: Every value that would have been accepted.
        meant: Values to suggest as far as they are known; without any, the nearest one is.
    """
    values = [str(value) for value in known]
    near = [str(value) for value in meant if value in values] or get_close_matches(word.lower(), values, n=1)
    suggestion = f"; did you mean {' or '.join(repr(value) for value in near)}?" if near else "."
    return typer.BadParameter(f"'{word}' is unknown{suggestion} Known values: {', '.join(values)}.")


def choice(kind: type[Choice]) -> Callable[[str], Choice]:
    """A parser for the values of an enum."""

    def parse(word: str) -> Choice:
        if word not in set(kind):
            raise unknown_value(word, kind, meant=REFERENCE_NAMES.get(word.lower(), ()))
        return kind(word)

    return parse


def choices(kind: type[Choice]) -> Callable[[str], tuple[Choice, ...]]:
    """A parser for values of an enum that are joined with ``+``."""
    parse_one = choice(kind)

    def parse(words: str) -> tuple[Choice, ...]:
        return tuple(parse_one(word.strip()) for word in words.split("+"))

    return parse


def parse_weights(text: str) -> tuple[float, float]:
    """Two finite numbers, such as ``2,1``; what they may be is decided later.

    Raises:
        typer.BadParameter: If they are not.
    """
    match = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*,\s*(-?\d+(?:\.\d+)?)\s*", text)
    if match is None:
        raise typer.BadParameter(f"'{text}' are no weights; write two numbers such as 2,1.")
    return float(match[1]), float(match[2])


def parse_device(word: str) -> str:
    """Accepts ``auto``, ``cpu``, ``cuda`` and ``cuda:1``; whether the machine has it is decided later."""
    if word in set(Device) or re.fullmatch(r"cuda:\d+", word):
        return word
    raise unknown_value(word, (*Device, "cuda:N"), meant=DEVICE_SYNONYMS.get(word.lower(), ()))


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
