"""Reads what is given to an option: words become enum members, texts become paths, and what does not fit is refused.

How a field is read follows from its annotation, so that every class of options is checked by ``check_fields`` alone.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from enum import StrEnum
from functools import lru_cache
from math import isfinite
from operator import index
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, SupportsFloat, SupportsIndex, TypeVar, Union, get_args, get_origin, get_type_hints

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.options.choices import Device

Choice = TypeVar("Choice", bound=StrEnum)

QUANTITY_UNITS: Mapping[str, int] = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
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


class WrongValue(ValueError):
    """A value that an option does not take; the message says why, but not which option."""


# Words and sizes


def read_choice(kind: type[Choice], word: str) -> Choice:
    """The member of an enum that a word stands for.

    Raises:
        WrongValue: If there is none; the known words are listed and, if one is near, it is suggested.
    """
    try:
        return kind(word)
    except ValueError:
        raise _unknown(word, kind, meant=REFERENCE_NAMES.get(word.lower(), ())) from None


def read_choices(kind: type[Choice], words: str) -> tuple[Choice, ...]:
    """The members of an enum that words joined with ``+`` stand for.

    Raises:
        WrongValue: If one of them is unknown.
    """
    return tuple(read_choice(kind, word.strip()) for word in words.split("+"))


def read_device(word: str) -> str:
    """Accepts ``auto``, ``cpu``, ``cuda`` and ``cuda:1``; whether the machine has it is decided later.

    Raises:
        WrongValue: If it is something else.
    """
    if word in set(Device) or re.fullmatch(r"cuda:\d+", word):
        return word
    raise _unknown(word, (*Device, "cuda:N"), meant=DEVICE_SYNONYMS.get(word.lower(), ()))


def read_size(text: str) -> int:
    """Bytes of a decimal size such as ``24GB`` or ``1.5 tb``.

    Raises:
        WrongValue: If it is not a size, or zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]{2})\s*", text)
    unit = SIZE_UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not float(match[1]):
        raise WrongValue(f"'{text}' is not a size; write a number and {', '.join(SIZE_UNITS)}, such as 5GB.")
    return int(float(match[1]) * unit)


def read_quantity(text: str) -> int:
    """A number of parameters such as ``16B`` or ``1.5 m``.

    Raises:
        WrongValue: If it is not a number of them, or zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]?)\s*", text)
    unit = QUANTITY_UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not float(match[1]):
        raise WrongValue(f"'{text}' is not a number of parameters; write one such as 16B or 800M.")
    return int(float(match[1]) * unit)


def read_width(value: int | str) -> int | str:
    """A number of neurons such as ``192``, or a share of them such as ``75%``.

    Raises:
        WrongValue: If it is neither, or zero, or more than all.
    """
    text = str(value).strip()
    if re.fullmatch(r"\d+", text) and int(text):
        return int(text)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
    if match is None or not 0 < float(match[1]) <= 100:
        raise WrongValue(f"'{text}' is not a width; write a number of neurons such as 512, or a share such as 75%.")
    return f"{float(match[1]):g}%"


def read_share(value: float) -> float:
    """A share such as 0.5.

    Raises:
        WrongValue: If it is not more than 0 and less than 1.
    """
    if not 0 < value < 1:
        raise WrongValue(f"{value:g} is not a share; write a number between 0 and 1, such as 0.5.")
    return value


def read_positive(value: float) -> float:
    """A number above 0.

    Raises:
        WrongValue: If it is not.
    """
    if not 0 < value < math.inf:
        raise WrongValue(f"{value:g} does not work; write a number above 0.")
    return value


def read_weight(value: float) -> float:
    """The weight of a part of a sum.

    Raises:
        WrongValue: If it is below 0.
    """
    if not 0 <= value < math.inf:
        raise WrongValue(f"{value:g} does not work; the lowest value is 0.")
    return value


def read_shard_size(text: str) -> str:
    """Checks a size and writes it as ``5GB``.

    Raises:
        WrongValue: If it is not a size, or zero.
    """
    read_size(text)
    return "".join(text.split()).upper()


def _unknown(word: str, known: Iterable[str], *, meant: Iterable[str]) -> WrongValue:
    """Lists the known words, and suggests what was meant: ``meant`` as far as it is known, or the nearest word."""
    values = [str(value) for value in known]
    near = [str(value) for value in meant if value in values] or get_close_matches(word.lower(), values, n=1)
    suggestion = f"; did you mean {' or '.join(repr(value) for value in near)}?" if near else "."
    return WrongValue(f"'{word}' is unknown{suggestion} Known values: {', '.join(values)}.")


# Annotations


def at_least(lowest: int) -> Callable[[int], int]:
    """A check of whole numbers."""

    def check(number: int) -> int:
        if number < lowest:
            raise WrongValue(f"{number} is too small; the lowest value is {lowest}.")
        return number

    return check


Count = Annotated[int, at_least(1)]
Natural = Annotated[int, at_least(0)]
DeviceName = Annotated[str, read_device]
ShardSize = Annotated[str, read_shard_size]
# Numbers may come as numbers, or as the texts that the command line takes.
Size = Annotated[int, at_least(1)] | Annotated[str, read_size]
Quantity = Annotated[int, at_least(1)] | Annotated[str, read_quantity]
Share = Annotated[float, read_share]
Positive = Annotated[float, read_positive]
Weight = Annotated[float, read_weight]
Width = Annotated[int | str, read_width]


def check_fields(options: Any) -> None:
    """Replaces every field of a frozen dataclass by the value that it stands for.

    Args:
        options: An instance whose fields hold what a caller has given.

    Raises:
        PlanError: If a field does not take its value; ``option`` is the field's name.
    """
    kind: Any = type(options)
    for name, hint in _hints(kind).items():
        try:
            object.__setattr__(options, name, _read(hint, getattr(options, name)))
        except WrongValue as error:
            raise PlanError(f"`{name}`: {error}", hint=f"correct the value of `{name}`", option=name) from None


@lru_cache
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _read(hint: Any, value: Any) -> Any:
    """A value as its annotation wants it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, check = arguments
        return check(_read(kind, value))
    if origin in (Union, UnionType):
        return None if value is None and NoneType in arguments else _read_any(arguments, value)
    if origin is tuple:
        return _read_tuple(arguments, value)
    if origin is Mapping:
        return _of(Mapping, value, "a mapping")
    if issubclass(hint, StrEnum):
        return read_choice(hint, _of(str, value, "a word"))
    read = _PLAIN.get(hint)
    return _of(hint, value, f"an instance of {hint.__name__}") if read is None else read(value)


def _read_any(kinds: tuple[Any, ...], value: Any) -> Any:
    """A value as the first annotation that takes it reads it; if none does, the last one says what is wrong."""
    *others, last = (kind for kind in kinds if kind is not NoneType)
    for kind in others:
        with suppress(WrongValue):
            return _read(kind, value)
    return _read(last, value)


def _read_tuple(kinds: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    first, is_open = kinds[0], kinds[-1] is Ellipsis
    if is_open and isinstance(value, str):
        if isinstance(first, type) and issubclass(first, StrEnum):
            return read_choices(first, value)
        if first is str:
            return (value,)
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise WrongValue(f"{value!r} is not a list or a tuple.")
    values = tuple(value)
    if is_open:
        return tuple(_read(first, one) for one in values)
    if len(values) != len(kinds):
        raise WrongValue(f"{value!r} does not hold {len(kinds)} values.")
    return tuple(_read(kind, one) for kind, one in zip(kinds, values, strict=True))


def _of(kind: type, value: Any, name: str) -> Any:
    if not isinstance(value, kind):
        raise WrongValue(f"{value!r} is not {name}.")
    return value


def read_integer(value: Any) -> int:
    """A whole number.

    Raises:
        WrongValue: If it is not one.
    """
    # Python counts True as a number.
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise WrongValue(f"{value!r} is not a whole number.")
    return index(value)


def _read_number(value: Any) -> float:
    if isinstance(value, bool | str) or not isinstance(value, SupportsFloat) or not isfinite(value):
        raise WrongValue(f"{value!r} is not a finite number.")
    return float(value)


def _read_path(value: Any) -> Path:
    return Path(_of(str | PathLike, value, "a path"))  # type: ignore[arg-type]


_PLAIN: Mapping[type, Callable[[Any], Any]] = {
    bool: lambda value: _of(bool, value, "True or False"),
    int: read_integer,
    float: _read_number,
    str: lambda value: _of(str, value, "a text"),
    Path: _read_path,
}
