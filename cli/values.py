"""Parsers of option values for typer; what a value may be is decided by the library."""

import math
import re
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from typing import ParamSpec, TypeVar

import typer

from hcsmoe_hub.options.checks import (
    WrongValue,
    read_choice,
    read_choices,
    read_device,
    read_positive,
    read_quantity,
    read_shard_size,
    read_share,
    read_size,
    read_weight,
    read_width,
)
from hcsmoe_hub.options.compression import read_compression
from hcsmoe_hub.options.memory_limits import read_limit

Choice = TypeVar("Choice", bound=StrEnum)
Value = TypeVar("Value")
Arguments = ParamSpec("Arguments")


def _parser(read: Callable[Arguments, Value]) -> Callable[Arguments, Value]:
    """Makes a usage error of a value that the library refuses."""

    def parse(*words: Arguments.args, **others: Arguments.kwargs) -> Value:
        try:
            return read(*words, **others)
        except WrongValue as error:
            raise typer.BadParameter(str(error)) from None

    return parse


parse_device = _parser(read_device)
parse_size = _parser(read_size)
parse_limit = _parser(read_limit)
parse_quantity = _parser(read_quantity)
parse_shard_size = _parser(read_shard_size)
parse_width = _parser(read_width)
parse_compression = _parser(read_compression)
parse_share = _parser(
    lambda text: read_share(_number(text, "is not a share; write a number between 0 and 1, such as 0.5"))
)
parse_positive = _parser(lambda text: read_positive(_number(text, "is not a number; write one above 0, such as 0.5")))
parse_weight = _parser(lambda text: read_weight(_number(text, "is not a number; write 0 or one above it, such as 0.5")))


def _number(text: str, problem: str) -> float:
    """A number that is neither infinite nor a joke such as ``nan``."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise WrongValue(f"'{text}' {problem}.")
    return number


def choice(kind: type[Choice]) -> Callable[[str], Choice]:
    """A parser for the values of an enum."""
    return _parser(partial(read_choice, kind))


def choices(kind: type[Choice]) -> Callable[[str], tuple[Choice, ...]]:
    """A parser for values of an enum that are joined with ``+``."""
    return _parser(partial(read_choices, kind))


def parse_counts(text: str) -> tuple[int, ...]:
    """Whole numbers from 1 on, such as ``96,64,48``, each once.

    Raises:
        typer.BadParameter: If they are not.
    """
    return _numbers(text, "a number of experts; write numbers such as 96,64,48")


def parse_batch_sizes(text: str) -> tuple[int, ...]:
    """Whole numbers from 1 on, such as ``1,16``, each once.

    Raises:
        typer.BadParameter: If they are not.
    """
    return _numbers(text, "a batch size; write numbers such as 1,16")


def _numbers(text: str, expected: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not re.fullmatch(r"\d{1,5}", word) or not int(word):
            raise typer.BadParameter(f"'{word}' is not {expected}.")
    return tuple(dict.fromkeys(map(int, words)))


def parse_widths(text: str) -> tuple[int | str, ...]:
    """Widths such as ``100%,75%,50%`` or ``512,384``, each once.

    Raises:
        typer.BadParameter: If one of them is not a width.
    """
    return tuple(dict.fromkeys(map(parse_width, text.split(","))))


def parse_weights(text: str) -> tuple[float, float]:
    """Two finite numbers, such as ``2,1``; which numbers make sense is decided later.

    Raises:
        typer.BadParameter: If they are not.
    """
    match = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*,\s*(-?\d+(?:\.\d+)?)\s*", text)
    if match is None:
        raise typer.BadParameter(f"'{text}' is not a pair of weights; write two numbers such as 2,1.")
    return float(match[1]), float(match[2])
