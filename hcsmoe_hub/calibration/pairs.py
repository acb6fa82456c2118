"""Finds the source and the target of a row, for models with an encoder and a decoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hcsmoe_hub.calibration.conversations import UnreadableError

Row = Mapping[str, Any]

# Columns of source and target, by the conventions of translation, of T5 and of its relatives; the first pair counts.
COLUMNS = (("source", "target"), ("src", "tgt"), ("inputs", "targets"), ("input_text", "target_text"))
# A column that holds an object of one text per language, source first.
TRANSLATION = "translation"
SOURCE_LANGUAGE, TARGET_LANGUAGE = ("source_lang", "src_lang"), ("target_lang", "tgt_lang")
# Number of a row, from 0, as the reader adds it where rows are those of one file.
NUMBER = "hcsmoe row"


class UnpairedError(UnreadableError):
    """A row has the columns of a pair, but lacks one side of it; the message says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """What an encoder reads, and what a decoder is to write.

    Attributes:
        source: Text for the encoder.
        target: Text for the decoder.
        source_lang: Its language as the tokenizer names it; ``None`` for that of the tokenizer.
        target_lang: The same of the target.
        row: The row in words, such as ``row 3``.
    """

    source: str
    target: str
    source_lang: str | None = None
    target_lang: str | None = None
    row: str = "a row"


def named_columns(column: str | None) -> tuple[str, str] | None:
    """The two columns that ``SOURCE,TARGET`` names; ``None`` for anything else."""
    names = [] if column is None else [name.strip() for name in column.split(",")]
    return (names[0], names[1]) if len(names) == 2 and all(names) else None


def pair_columns(row: Row) -> tuple[str, str] | None:
    """The columns of source and target, found by their usual names; ``None`` if there are none with content."""
    for names in COLUMNS:
        if all(name in row for name in names) and any(row[name] is not None for name in names):
            return names
    translation = row.get(TRANSLATION)
    if isinstance(translation, dict):
        languages = [language for language, text in translation.items() if text is not None]
        if len(languages) == 2:
            return f"{TRANSLATION}.{languages[0]}", f"{TRANSLATION}.{languages[1]}"
    return None


def has_column(row: Row, name: str) -> bool:
    """Whether a row has a column; ``translation.en`` is a key of an object in one."""
    outer, dot, inner = name.partition(".")
    held = row.get(outer)
    return name in row or (bool(dot) and isinstance(held, dict) and inner in held)


def read_pair(row: Row, columns: tuple[str, str], *, place: str | None = None) -> Pair:
    """The pair in two columns of a row.

    Args:
        row: The row.
        columns: Names of the columns; ``translation.en`` is a key of an object in one.
        place: What messages call the row; ``None`` for its number, if that is known.

    Raises:
        UnpairedError: If a side is missing, empty or not text.
    """
    place = place or name_row(row)
    source, target = (_side(row, name, side, place) for name, side in zip(columns, ("source", "target"), strict=True))
    nested = [name.partition(".")[2] or None for name in columns]
    source_lang = _language(row, SOURCE_LANGUAGE, place) or nested[0]
    target_lang = _language(row, TARGET_LANGUAGE, place) or nested[1]
    return Pair(source=source, target=target, source_lang=source_lang, target_lang=target_lang, row=place)


def name_row(row: Row) -> str:
    """A row in words, with its number if that is known."""
    return f"row {row[NUMBER] + 1}" if NUMBER in row else "a row"


def _side(row: Row, name: str, side: str, place: str) -> str:
    value = row.get(name)
    if value is None:
        outer, _, inner = name.partition(".")
        held = row.get(outer)
        value = held.get(inner) if isinstance(held, dict) else None
    if value is None:
        raise UnpairedError(f"{place} has no {side}")
    if not isinstance(value, str):
        raise UnpairedError(f"the {side} of {place} is {value!r:.40}, which is not text")
    if not value.strip():
        raise UnpairedError(f"the {side} of {place} is empty")
    return value


def _language(row: Row, names: tuple[str, ...], place: str) -> str | None:
    name = next((name for name in names if row.get(name)), None)
    if name is None:
        return None
    if not isinstance(row[name], str):
        raise UnpairedError(f"{name} of {place} is {row[name]!r:.40}, which is not text")
    return str(row[name])
