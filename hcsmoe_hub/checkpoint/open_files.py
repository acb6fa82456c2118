"""Files that are read from several threads, of which only a few stay open."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# A layer is rarely spread over more shards, and macOS allows a process 256 files.
MOST = 8


# Called with the descriptor of a file that has just been opened.
OnOpen = Callable[[int], None]


@dataclass(slots=True)
class _OpenFile:
    descriptor: int
    readers: int = 0
    is_last: bool = False


class OpenFiles:
    """Opens files for reading and closes those that were not read for the longest time.

    A file that is being read stays open, so more than ``MOST`` are open only while as many threads read.
    """

    def __init__(self) -> None:
        # In the order of their last use.
        self._files: dict[Path, _OpenFile] = {}
        self._lock = threading.Lock()

    @contextmanager
    def reading(self, path: Path, check: OnOpen = lambda descriptor: None) -> Iterator[int]:
        """The descriptor of an open file, for ``os.preadv``.

        Args:
            path: The file.
            check: Called with its descriptor if it was not open, and may raise.

        Raises:
            OSError: If the file cannot be opened.
        """
        with self._lock:
            file = self._files.pop(path, None) or _open(path, check)
            self._files[path] = file
            file.readers += 1
            self._close_idle(MOST)
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.readers -= 1
                if file.is_last and not file.readers:
                    os.close(file.descriptor)
                self._close_idle(MOST)

    def _close_idle(self, most: int) -> None:
        for path in [path for path, file in self._files.items() if not file.readers][: max(0, len(self._files) - most)]:
            os.close(self._files.pop(path).descriptor)

    def close(self, path: Path) -> None:
        """Closes one file; if it is being read, as soon as that has ended."""
        with self._lock:
            file = self._files.pop(path, None)
            if file is None:
                return
            file.is_last = True
            if not file.readers:
                os.close(file.descriptor)

    def close_all(self) -> None:
        """Closes every file; nobody is reading any of them."""
        with self._lock:
            for file in self._files.values():
                os.close(file.descriptor)
            self._files.clear()


def _open(path: Path, check: OnOpen) -> _OpenFile:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        check(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return _OpenFile(descriptor)
