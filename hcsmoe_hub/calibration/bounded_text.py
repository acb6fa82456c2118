"""Looks at text files line by line before a library parses them: somebody else's file may be of one endless line.

Parsers read a whole line, or a whole paragraph or row, before they look at it, and that of pyarrow ends the process at
JSON that is nested too deeply.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hcsmoe_hub.errors import CalibrationError
from hcsmoe_hub.machine.memory import available_memory

# A document: the longest books have a third of it.
LONGEST = 16_000_000
# Lists and objects inside each other.
DEEPEST = 200
# A row of a table whose text has line breaks; one quotation mark too many makes a row of all that follows.
LONGEST_ROW = 4 * LONGEST
# What is made of a JSON document takes about so many times its length.
_TIMES = 8
_BLOCK = 1 << 20
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_STEPS = np.zeros(256, dtype=np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1
_HINT = "correct or remove it"


class Checker:
    """Looks at the blocks of one file, in order.

    Args:
        path: The file, for messages.
        reader: What reads it: ``json``, ``csv`` or ``text``.
    """

    def __init__(self, path: Path, reader: str) -> None:
        self._path = path
        self._reader = reader
        self._is_list: bool | None = None
        self._line, self._length, self._quotes, self._row = 1, 0, 0, 0
        self._parts: list[bytes] = []
        self._seen, self._depth, self._rest = 0, 0, b""

    def feed(self, block: bytes) -> None:
        """Looks at the next block; an empty one is the end.

        Raises:
            CalibrationError: If a document in it is too long, or nested too deeply.
        """
        self._seen += len(block)
        if self._reader == "json" and self._is_list is None and block.strip():
            # Without a line for each document, the whole file is one.
            self._is_list = block.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        if self._is_list:
            self._feed_list(block)
            return
        first, *others = block.split(b"\n")
        self._extend(first)
        for part in others:
            self._end_line()
            self._extend(part)
        if not block:
            self._end_line()

    def _extend(self, part: bytes) -> None:
        self._length += len(part)
        if self._length > LONGEST:
            what = "paragraph that ends in or after line" if self._reader == "text" else "line"
            raise self._refusal(f"{what} {self._line} of the file has more than {LONGEST} bytes")
        self._parts.append(part)

    def _end_line(self) -> None:
        line = b"".join(self._parts)
        match self._reader:
            case "json":
                if line.count(b"[") + line.count(b"{") > DEEPEST:
                    self._check_depth(_STRING.sub(b"", line), 0)
                self._length = 0
            case "csv":
                self._quotes += line.count(b'"')
                self._row = 0 if self._quotes % 2 == 0 else self._row + len(line)
                if self._row > LONGEST_ROW:
                    what = f"a quotation mark is not closed for {LONGEST_ROW} bytes"
                    raise self._refusal(f"{what} before line {self._line} of the file")
                self._length = 0
            case _:
                # A paragraph ends with a blank line.
                self._length = self._length if line.strip(b"\r") else 0
        self._parts = []
        self._line += 1

    def _feed_list(self, block: bytes) -> None:
        """The next block of a file that is one JSON list."""
        most = available_memory() // _TIMES
        if self._seen > most:
            raise CalibrationError(
                f"{self._path} cannot be read: it is one JSON list of more than {most} bytes, too long for the memory "
                "of this machine.",
                hint="write it as JSON Lines, one object per line",
            )
        text = _STRING.sub(b"", self._rest + block)
        # What follows a quotation mark now is a string that goes on in the next block.
        start = text.find(b'"')
        text, self._rest = (text, b"") if start < 0 else (text[:start], text[start:])
        if len(self._rest) > LONGEST:
            raise self._refusal(f"it holds a text of more than {LONGEST} bytes")
        self._line += block.count(b"\n")
        self._depth = self._check_depth(text, self._depth)

    def _check_depth(self, text: bytes, depth: int) -> int:
        """The depth after a text without strings."""
        depths = np.cumsum(_STEPS[np.frombuffer(text, np.uint8)], dtype=np.int64) + depth
        if depths.max(initial=0) > DEEPEST:
            where = "the list" if self._is_list else f"line {self._line} of the file"
            raise self._refusal(
                f"{where} is nested too deeply: more than {DEEPEST} lists and objects inside each other"
            )
        return int(depths[-1]) if len(depths) else depth

    def _refusal(self, what: str) -> CalibrationError:
        return CalibrationError(f"{self._path} cannot be read: {what}.", hint=_HINT)


def check_file(file: BinaryIO, path: Path, reader: str) -> None:
    """Looks at a whole file.

    Args:
        file: Its content, not compressed.
        path: Its name in messages.
        reader: What will read it: ``json``, ``csv`` or ``text``.

    Raises:
        CalibrationError: If a document in it is too long, or nested too deeply.
    """
    checker = Checker(path, reader)
    for block in _blocks(file):
        checker.feed(block)
    checker.feed(b"")


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def find_invalid_line(file: BinaryIO, path: Path) -> CalibrationError | None:
    """Which line of a file of JSON Lines is not JSON; ``None`` if all are, or the file is one JSON list.

    Args:
        file: Its content, not compressed.
        path: Its name in messages.
    """
    number = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if number == 1 and line.lstrip().startswith(b"["):
            return None
        try:
            if line.strip():
                json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            what = f"line {number} of the file is not JSON: {reason}"
            return CalibrationError(f"{path} cannot be read: {what}.", hint=_HINT)
    return None
