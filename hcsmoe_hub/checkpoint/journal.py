"""The journal of a conversion: what is done for good, one line of JSON per step.

A line counts once it is complete. Whatever a killed process, a full disk or a power cut leaves behind the last complete
line is ignored, and overwritten by the next one.
"""

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from hcsmoe_hub.checkpoint.durable import naming, sync_folder

Line: TypeAlias = dict[str, Any]


class Journal:
    """Reads and extends a journal, from any thread.

    Args:
        path: The file; it and its folder are made with the first line.

    Attributes:
        lines: The complete lines, in order.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self.lines, self._end = _read(path)

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds a line; when this returns, it is on the disk.

        Raises:
            OSError: If it cannot be written. The journal stays as it was.
        """
        content = json.dumps(line).encode() + b"\n"
        with self._lock:
            is_new = not self._path.exists()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with naming(self._path), self._path.open("wb" if is_new else "r+b") as file:
                # Part of a line may be left there.
                file.truncate(self._end)
                file.seek(self._end)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if is_new:
                sync_folder(self._path.parent)
            self._end += len(content)
            self.lines.append(dict(line))


def _read(path: Path) -> tuple[list[Line], int]:
    """The complete lines of a journal, and the position after them."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    lines, end = list[Line](), 0
    for text in content.splitlines(keepends=True):
        try:
            line = json.loads(text) if text.endswith(b"\n") else None
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict):
            break
        lines.append(line)
        end += len(text)
    return lines, end
