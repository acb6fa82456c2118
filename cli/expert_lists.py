"""Parses lists of layers and experts, typed or kept in a file."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import typer

EVERY_LAYER = "*"
# More digits than any model needs, and few enough that a range cannot fill the memory.
_SPAN = re.compile(r"(\d{1,5})(?:\s*-\s*(\d{1,5}))?")


def _span(text: str, *, of: str) -> range:
    """The numbers of ``7`` or ``3-7``.

    Raises:
        typer.BadParameter: If it is neither, or ends before it begins.
    """
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(
            f"'{text.strip()}' is not a valid {of}; write a number such as 3, or a range such as 0-7."
        )
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise typer.BadParameter(f"the range '{text.strip()}' ends before it begins.")
    return range(first, last + 1)


def parse_layers(text: str) -> tuple[int, ...]:
    """Layers of a list such as ``0-3,7``, ascending, each once.

    Raises:
        typer.BadParameter: If it is not such a list.
    """
    return tuple(sorted({layer for item in text.split(",") for layer in _span(item, of="layer")}))


def parse_protected(text: str) -> tuple[tuple[int | None, int], ...]:
    """``(layer, expert)`` pairs of a list such as ``3:17,*:0-2,5``, or of a file with such lists.

    Args:
        text: Items ``LAYER:EXPERT`` separated by commas, where either may be a range; ``*`` stands for every layer, as
            does leaving the layer out. Or the name of a file of such items, with or without a leading ``@``: there a
            line also ends an item, and ``#`` starts a comment.

    Returns:
        Pairs in order, each once; a layer of ``None`` stands for every layer.

    Raises:
        typer.BadParameter: If it is neither.
    """
    # Unlike pathlib, os.path takes a list that is too long for a file name.
    is_file = text.startswith("@") or os.path.isfile(text)
    items = list(_items_of_file(Path(text.removeprefix("@")))) if is_file else text.split(",")
    return tuple(dict.fromkeys(pair for item in items for pair in _pairs(item)))


def _items_of_file(path: Path) -> Iterator[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"the list of experts {path} cannot be read: {error}.") from error
    for line in content.splitlines():
        for item in line.partition("#")[0].split(","):
            if item.strip():
                yield item


def _pairs(item: str) -> Iterator[tuple[int | None, int]]:
    where, colon, experts = item.rpartition(":")
    is_every = not colon or where.strip() == EVERY_LAYER
    layers: list[int | None] = [None] if is_every else [*_span(where, of="layer")]
    for layer in layers:
        for expert in _span(experts, of="expert"):
            yield layer, expert
