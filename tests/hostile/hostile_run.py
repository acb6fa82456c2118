"""Runs the command line on hostile inputs, each in a process that is forked from one that has all imports."""

import io
import os
import resource
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the command did.

    Attributes:
        code: Exit code; negative for a signal.
        text: Standard error.
        peak: Largest resident set in bytes, what was imported included.
        seconds: Wall time.
        touched: Paths outside the output folder that appeared, changed or vanished.
    """

    code: int
    text: str
    peak: int
    seconds: float
    touched: list[str]

    @property
    def is_clean(self) -> bool:
        """Whether it was refused with a short message, in bounds."""
        lines = [line for line in self.text.splitlines() if line.strip() and not line.startswith("Warning:")]
        is_short = 1 <= len(lines) <= 3 and "Traceback" not in self.text
        return self.code in (1, 2) and is_short and self.peak < 2**30 and not self.touched


def run(folder: Path, argv: list[str], *, seconds: int = 300) -> Outcome:
    """Runs a command in a forked process.

    Args:
        folder: What it may not change, but for its sub-folder ``out``.
        argv: Words of the command.
        seconds: Longest wall time.
    """
    before = _snapshot(folder)
    start = time.monotonic()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _run_child(folder, argv, write, seconds)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode(errors="replace")
    _, status, usage = os.wait4(child, 0)
    after = _snapshot(folder)
    return Outcome(
        code=os.waitstatus_to_exitcode(status),
        text=text,
        peak=usage.ru_maxrss * 1024,
        seconds=time.monotonic() - start,
        touched=sorted(str(path) for path, _ in before.items() ^ after.items()),
    )


def _run_child(folder: Path, argv: list[str], write: int, seconds: int) -> None:
    from hcsmoe_hub.cli import main

    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    errors, code = io.StringIO(), 99
    os.chdir(folder)
    sys.argv = ["hcsmoe", *argv]
    try:
        with redirect_stderr(errors), redirect_stdout(io.StringIO()):
            main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        errors.write(f"Traceback: {type(error).__name__}: {error}")
    with os.fdopen(write, "wb") as pipe:
        pipe.write(errors.getvalue().encode())
    os._exit(code)


def _snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    """Sizes and times of all files but those of the output."""
    found = {}
    for path in folder.rglob("*"):
        place = path.relative_to(folder)
        if place.parts[0] != "out" and not path.is_dir():
            status = path.lstat()
            found[place] = status.st_size, status.st_mtime_ns
    return found
