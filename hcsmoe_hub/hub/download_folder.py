"""A download folder that belongs to one process at a time and can be resumed by a later one."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def download_folder(parent: Path, name: str, wanted: Collection[str]) -> Iterator[Path]:
    """Claims a folder and keeps the wanted files that an interrupted run left there; removes all other leftovers.

    The folder is deleted on success. After a failure the next run resumes from it.

    Args:
        parent: Parent folder, shared with other processes and revisions.
        name: What the files belong to, such as a commit.
        wanted: Names of files to resume.
    """
    parent.mkdir(parents=True, exist_ok=True)
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    folder, lock = next((parent / free, lock) for free in names if (lock := _lock(parent, free)) is not None)
    try:
        _clear(parent, keep=folder)
        folder.mkdir(exist_ok=True)
        for file in folder.iterdir():
            if file.name not in wanted:
                file.unlink()
        yield folder
        shutil.rmtree(folder)
    finally:
        _unlock(lock, folder)


def _lock(parent: Path, name: str) -> FileLock | None:
    """The lock of a folder, or ``None`` if another process holds it."""
    lock = FileLock(parent / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def _unlock(lock: FileLock, folder: Path) -> None:
    """Releases a folder, and removes its lock file if the folder is gone."""
    if not folder.exists():
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
    # Other processes may have folders of their own next to it.
    with suppress(OSError):
        folder.parent.rmdir()


def _clear(parent: Path, *, keep: Path) -> None:
    """Removes the folders of other runs that have ended."""
    for folder in [path.with_suffix("") for path in parent.glob("*.lock")]:
        lock = None if folder == keep else _lock(parent, folder.name)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            _unlock(lock, folder)
