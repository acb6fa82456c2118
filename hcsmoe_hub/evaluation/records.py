"""Reads evaluation files: text, and multiple choice."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hcsmoe_hub.calibration.pairs import Pair, UnpairedError, pair_columns, read_pair
from hcsmoe_hub.errors import PlanError

_HINT = "correct that line; docs/evaluation.md describes the file format"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecord:
    """One document.

    Attributes:
        text: Its text.
        domain: Its domain, ``None`` if the file does not name one.
    """

    text: str
    domain: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRecord:
    """One source with its target.

    Attributes:
        pair: Both texts.
        domain: Their domain, ``None`` if the file does not name one.
    """

    pair: Pair
    domain: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceItem:
    """One question.

    Attributes:
        context: Text before every choice.
        choices: The candidates, at least two.
        gold: Index of the correct choice.
        domain: Its domain, ``None`` if the file does not name one.
    """

    context: str
    choices: tuple[str, ...]
    gold: int
    domain: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """Identity of an evaluation file.

    Attributes:
        name: File name without its folder.
        sha256: SHA-256 of its bytes.
        records: Number of records used.
    """

    name: str
    sha256: str
    records: int


def read_texts(path: Path) -> tuple[list[TextRecord], FileRecord]:
    """Reads ``{"text", "domain"}`` records; blank documents are skipped.

    Raises:
        PlanError: If the file cannot be read, or holds no text.
    """
    content = _read(path)
    records = []
    for line, row in _rows(path, content):
        text = row.get("text")
        if not isinstance(text, str):
            _refuse(path, line, f"has no text: its columns are {', '.join(row) or 'none'}")
        _check_unicode(path, line, text)
        if text.strip():
            records.append(TextRecord(text=text, domain=_domain(path, line, row)))
    if not records:
        raise PlanError(f"{path} holds no text.", hint='pass lines such as {"text": "...", "domain": "prose"}')
    return records, _file_record(path, content, len(records))


def read_sides(path: Path) -> tuple[list[TextRecord | PairRecord], FileRecord]:
    """Reads ``{"source", "target", "domain"}`` records, and ``{"text", "domain"}`` ones; blank text is skipped.

    Raises:
        PlanError: If the file cannot be read, holds nothing, or a record lacks a side.
    """
    content = _read(path)
    records: list[TextRecord | PairRecord] = []
    for line, row in _rows(path, content):
        columns, text = pair_columns(row), row.get("text")
        if columns is not None:
            records.append(PairRecord(pair=_pair(path, line, row, columns), domain=_domain(path, line, row)))
            continue
        if not isinstance(text, str):
            _refuse(path, line, f"has neither source and target nor text: its columns are {', '.join(row) or 'none'}")
        _check_unicode(path, line, text)
        if text.strip():
            records.append(TextRecord(text=text, domain=_domain(path, line, row)))
    if not records:
        raise PlanError(f"{path} holds no text.", hint='pass lines such as {"source": "...", "target": "..."}')
    return records, _file_record(path, content, len(records))


def _pair(path: Path, line: int, row: dict[str, Any], columns: tuple[str, str]) -> Pair:
    try:
        pair = read_pair(row, columns, place=f"line {line} of {path}")
    except UnpairedError as error:
        raise PlanError(f"{printable(str(error))}.", hint=_HINT) from error
    _check_unicode(path, line, pair.source, pair.target)
    return pair


def read_choices(path: Path) -> tuple[list[ChoiceItem], FileRecord]:
    """Reads ``{"context", "choices", "gold", "domain"}`` records.

    Raises:
        PlanError: If the file cannot be read, or a record lacks something or contradicts itself.
    """
    content = _read(path)
    items = [_choice_item(path, line, row) for line, row in _rows(path, content)]
    return items, _file_record(path, content, len(items))


def _choice_item(path: Path, line: int, row: dict[str, Any]) -> ChoiceItem:
    missing = [name for name in ("context", "choices", "gold") if name not in row]
    if missing:
        _refuse(path, line, f"lacks {' and '.join(missing)}: its columns are {', '.join(row) or 'none'}")
    context, choices, gold = row["context"], row["choices"], row["gold"]
    if not isinstance(context, str):
        _refuse(path, line, "has a context that is not text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(text, str) and text for text in choices):
        _refuse(path, line, "needs choices that are a list of two or more texts")
    if type(gold) is not int or not 0 <= gold < len(choices):
        _refuse(path, line, f"has gold {gold!r:.60}, but its choices are numbered 0 to {len(choices) - 1}")
    _check_unicode(path, line, context, *choices)
    return ChoiceItem(context=context, choices=tuple(choices), gold=gold, domain=_domain(path, line, row))


def _read(path: Path) -> bytes:
    try:
        if path.is_file():
            return path.read_bytes()
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror or error}.", hint="check the file") from error
    raise PlanError(f"there is no file {path}.", hint="check the path")


def _rows(path: Path, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers from 1, and the objects in them; blank lines are skipped."""
    is_empty = True
    # Only newlines end a record: other line separators may occur inside a JSON string.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        is_empty = False
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            _refuse(path, number, f"is not UTF-8 text ({error})")
        except json.JSONDecodeError as error:
            _refuse(path, number, f"is not valid JSON ({error})")
        except ValueError:
            # Python refuses to read whole numbers of thousands of digits.
            _refuse(path, number, "holds a number with too many digits")
        except RecursionError:
            _refuse(path, number, "is nested too deeply")
        if not isinstance(row, dict):
            _refuse(path, number, "is not a JSON object")
        yield number, row
    if is_empty:
        raise PlanError(f"{path} is empty.", hint="pass a .jsonl file with one JSON object per line")


def _domain(path: Path, line: int, row: dict[str, Any]) -> str | None:
    domain = row.get("domain")
    if not (domain is None or isinstance(domain, str)):
        _refuse(path, line, f"has the domain {domain!r:.60}, which is not text")
    _check_unicode(path, line, domain or "")
    return domain


def _check_unicode(path: Path, line: int, *texts: str) -> None:
    """JSON can hold half of a surrogate pair, which is not a character and which no tokenizer takes."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            _refuse(path, line, f"holds half of a surrogate pair, {text[error.start]!a}, which is not a character")


def _refuse(path: Path, line: int, reason: str) -> NoReturn:
    raise PlanError(f"line {line} of {path} {printable(reason)}.", hint=_HINT)


def printable(text: str) -> str:
    """A text that can be printed; names of columns and domains may hold halves of characters."""
    return text.encode("utf-8", "backslashreplace").decode()


def _file_record(path: Path, content: bytes, records: int) -> FileRecord:
    return FileRecord(name=path.name, sha256=hashlib.sha256(content).hexdigest(), records=records)
