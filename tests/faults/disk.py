"""A disk that fails: builds ``faults.c``, starts processes with it, and says there which call fails."""

import ctypes
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from functools import cache
from hashlib import sha256
from pathlib import Path

SOURCE = Path(__file__).with_name("faults.c")


class How(IntFlag):
    """What else happens at the call that fails."""

    ONCE = 0
    # Later calls fail too, as on a full disk.
    KEEPS = 1
    # A write has written half of its bytes.
    HALF = 2
    # The process ends there, as a killed one does.
    ENDS = 4
    # The process stops there until it is continued, and the call succeeds.
    STOPS = 8


@dataclass(frozen=True, slots=True)
class Fault:
    """A failure of the disk.

    Attributes:
        at: Number of the call that fails, from 1; 0 for none.
        code: Its errno.
        how: What else happens.
    """

    at: int = 0
    code: int = errno.ENOSPC
    how: How = How.KEEPS


NO_FAULT = Fault()


def missing_tool() -> str | None:
    """What the machine lacks for failing disks, or ``None``."""
    if sys.platform != "linux":
        return "Linux"
    compiler = os.environ.get("CXX", "c++")
    return None if shutil.which(compiler) else f"the compiler `{compiler}` (`apt install g++`)"


def build() -> Path:
    """The compiled library: built at the first call for this source and kept for later ones."""
    key = sha256(SOURCE.read_bytes()).hexdigest()[:12]
    library = Path(tempfile.gettempdir()) / f"hcsmoe-faults-{os.getuid()}" / f"{key}.so"
    if not library.exists():
        library.parent.mkdir(mode=0o700, exist_ok=True)
        # Under a name of its own, so that no other process loads half of it.
        part = library.with_suffix(f".{os.getpid()}")
        command = [os.environ.get("CXX", "c++"), "-x", "c", "-O1", "-shared", "-fPIC", "-o", str(part), str(SOURCE)]
        done = subprocess.run([*command, "-ldl"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the failing disk cannot be built:\n{done.stderr}")
        part.replace(library)
    return library


def environment(**variables: str) -> dict[str, str]:
    """Environment of a process that has the library, and what ``faults.c`` reads from it."""
    return os.environ | {"LD_PRELOAD": str(build()), **variables}


@cache
def _library() -> ctypes.CDLL:
    """The library in this process, which was started with it."""
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    library.fault_what.restype = ctypes.c_char_p
    library.fault_calls.restype = ctypes.c_long
    return library


def arm(folders: Sequence[Path], fault: Fault) -> None:
    """Counts calls below some folders from now on, and lets one of them fail."""
    below = ":".join(str(folder.resolve()) for folder in folders)
    _library().fault_set(below.encode(), ctypes.c_long(fault.at), fault.code, int(fault.how))


def calls() -> int:
    """How many calls were counted."""
    return int(_library().fault_calls())


def what_failed() -> str:
    """The call that failed, and its path; empty if none has."""
    found: bytes = _library().fault_what()
    return found.decode()


def list_changes(file: Path | None) -> None:
    """Lists from now on everything that is changed on a disk, wherever it is; ``None`` ends the list."""
    _library().fault_list(str(file or "").encode())


def let_clock_jump(after: int, seconds: int) -> None:
    """Lets the clock of the day jump after some readings."""
    _library().fault_clock(ctypes.c_long(after), ctypes.c_long(seconds))
