"""Writes files such that they survive a power cut once their name is there, and are never seen half-written."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

# What a file is called until it is complete.
INCOMPLETE = ".incomplete"

# Some file systems, most of them on a network, have no fsync for folders; they need none or offer nothing better.
_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EISDIR})


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets failures of the disk inside a ``with`` block name a file, as those of an open file do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def sync_file(path: Path) -> None:
    """Waits until the content of a file is on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(file)
    finally:
        os.close(file)


def sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on the disk; does nothing where the file system cannot do that."""
    try:
        sync_file(path)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def sync_tree(folder: Path) -> None:
    """Waits until everything below a folder is on the disk, and its own names."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            sync_file(path)
    sync_folder(folder)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON such that the file is complete and on the disk when it has its name."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file such that it is complete and on the disk when it has its name."""

    def fill(file: BinaryIO) -> None:
        file.write(content)

    write_file(path, fill)


def copy_file(source: Path, path: Path) -> None:
    """Copies the bytes of a file such that the copy is complete and on the disk when it has its name."""

    def fill(file: BinaryIO) -> None:
        with source.open("rb") as original:
            shutil.copyfileobj(original, file)

    write_file(path, fill)


def write_file(path: Path, fill: Callable[[BinaryIO], None]) -> None:
    """Writes a file under a temporary name, waits until it is on the disk, and renames it.

    Args:
        path: Its name; a file of that name is replaced.
        fill: Writes the content.

    Raises:
        OSError: If the disk fails; a file of that name is then as it was.
    """
    temporary = path.with_name(path.name + INCOMPLETE)
    try:
        with naming(temporary), temporary.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
