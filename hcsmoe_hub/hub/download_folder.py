"""A folder of unfinished downloads that belongs to one process, and that a later one takes over.

No locks: on some shared file systems they are granted to everybody. Each run has a folder of its own, whose name holds
the machine and the process; a folder is taken over by renaming it, which only one run can do, and only if its process
has ended.
"""

import os
import platform
import re
import secrets
import shutil
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

# A run shows that it is alive by touching its folder.
TOUCH_SECONDS = 60.0
# A folder that was not touched for so long belongs to nobody, even if its process cannot be asked.
IDLE_SECONDS = 3600.0
# In place of the process in the name of a folder that a run has left.
LEFT = "left"
# Folders of this process: in a container that is started again, an earlier process may have had the same number.
_OWN: set[str] = set()
_OWN_LOCK = threading.Lock()


@contextmanager
def download_folder(parent: Path, name: str, wanted: Collection[str]) -> Iterator[Path]:
    """A new folder with the wanted files that an interrupted run left; removes what other ended runs left.

    The folder is deleted on success. After a failure the next run resumes from it.

    Args:
        parent: Parent folder, shared with other processes and revisions.
        name: What the files belong to, such as a commit; without dots.
        wanted: Names of files to resume.
    """
    folder = parent / ".".join((name, secrets.token_hex(4), _this_machine(), str(os.getpid())))
    with _OWN_LOCK:
        _OWN.add(folder.name)
    _take_over(parent, name, folder)
    stop = threading.Event()
    thread = threading.Thread(target=_touch, args=(folder, stop), name="download-folder", daemon=True)
    try:
        for file in folder.iterdir():
            if file.name not in wanted:
                file.unlink()
        thread.start()
        yield folder
        shutil.rmtree(folder)
    finally:
        stop.set()
        with _OWN_LOCK:
            _OWN.discard(folder.name)
        # Another run may have it, if this process was suspended for long.
        with suppress(FileNotFoundError):
            os.rename(folder, parent / ".".join((*folder.name.split(".")[:2], LEFT)))
        # Other processes may have folders of their own next to it.
        with suppress(OSError):
            parent.rmdir()


def remove_left(parent: Path) -> None:
    """Deletes what runs that have ended have left.

    Args:
        parent: Parent folder, as in ``download_folder``.
    """
    with download_folder(parent, "none", ()):
        pass


def _this_machine() -> str:
    return re.sub(r"[^\w-]", "-", platform.node()) or "localhost"


def _touch(folder: Path, stop: threading.Event) -> None:
    while not stop.wait(TOUCH_SECONDS):
        with suppress(OSError):
            os.utime(folder)


def _take_over(parent: Path, name: str, folder: Path) -> None:
    """Makes the folder, from the largest one that was left for the same name if there is one; deletes the others."""
    folder.mkdir(parents=True)
    # The clock of the file system, which need not be that of this machine.
    now = folder.stat().st_mtime
    left = [path for path in parent.iterdir() if _is_left(path, now)]
    is_new = True
    for path in sorted(left, key=_nbytes, reverse=True):
        is_wanted = is_new and path.is_dir() and path.name.split(".")[0] == name
        target = folder if is_wanted else parent / f"{folder.name}.old"
        # Another run may be faster.
        with suppress(FileNotFoundError):
            os.rename(path, target)
            if is_wanted:
                is_new = False
                os.utime(folder)
            else:
                _remove(target)


def _is_left(path: Path, now: float) -> bool:
    """Whether the run that a folder belongs to has ended."""
    try:
        is_idle = now - path.stat().st_mtime > IDLE_SECONDS
    except FileNotFoundError:
        return False
    words = path.name.split(".")
    if is_idle or (len(words) == 3 and words[2] == LEFT):
        return True
    if len(words) != 4 or words[2] != _this_machine() or not words[3].isdecimal():
        return False
    process = int(words[3])
    return path.name not in _OWN if process == os.getpid() else not psutil.pid_exists(process)


def _nbytes(folder: Path) -> int:
    total = 0
    # Another run may take it over meanwhile.
    with suppress(OSError):
        for file in folder.iterdir():
            total += file.stat().st_size
    return total


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
