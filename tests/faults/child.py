"""Runs commands of hcsmoe in children of this process, which has imported everything once."""

import io
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from faults import disk

# Longest that a conversion of a tiny model takes, in seconds, on a busy machine.
LONGEST = 180


@dataclass(frozen=True, slots=True)
class Run:
    """How a command ended.

    Attributes:
        code: Its exit code; negative for a signal.
        text: What it printed on stderr.
        calls: How many calls were counted.
        failed: The call that failed, and its path; empty if none has.
    """

    code: int
    text: str
    calls: int
    failed: str


def here(arguments: Sequence[str]) -> None:
    """Runs a command in this process; it has to succeed."""
    from hcsmoe_hub.cli import main

    before, sys.argv = sys.argv, ["hcsmoe", *arguments]
    stdout = io.StringIO()
    try:
        with redirect_stdout(stdout):
            main()
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"hcsmoe {' '.join(arguments)} ends with {ended.code}") from None
    finally:
        sys.argv = before


def run(arguments: Sequence[str], folder: Path, prepare: Callable[[], None] = lambda: None) -> Run:
    """Runs a command of hcsmoe in a child of this process.

    Args:
        arguments: What follows ``hcsmoe``.
        folder: Where the child leaves what it has printed.
        prepare: Called in the child first.
    """
    return start(arguments, folder, prepare).wait()


def start(arguments: Sequence[str], folder: Path, prepare: Callable[[], None] = lambda: None) -> "Child":
    """Begins to run a command of hcsmoe in a child of this process; the arguments are those of ``run``."""
    handle, printed = tempfile.mkstemp(dir=folder, prefix="printed-")
    child = os.fork()
    if not child:
        _be_child(arguments, handle, prepare)
    os.close(handle)
    return Child(child, Path(printed))


@dataclass(frozen=True, slots=True)
class Child:
    """A command that runs in a child of this process.

    Attributes:
        number: Of the process.
        printed: Where its stderr goes.
    """

    number: int
    printed: Path

    def wait_until_stopped(self) -> bool:
        """Waits until it has stopped; ``False`` if it has ended instead."""
        _, status = os.waitpid(self.number, os.WUNTRACED)
        return os.WIFSTOPPED(status)

    def go_on(self) -> None:
        """Continues it after it has stopped."""
        os.kill(self.number, signal.SIGCONT)

    def wait(self) -> Run:
        """Waits for its end."""
        _, status = os.waitpid(self.number, 0)
        text = self.printed.read_text("utf-8", errors="replace")
        self.printed.unlink()
        return Run(code=os.waitstatus_to_exitcode(status), text=text, calls=disk.calls(), failed=disk.what_failed())


def _be_child(arguments: Sequence[str], printed: int, prepare: Callable[[], None]) -> None:
    """Runs a command and ends this process."""
    from hcsmoe_hub.cli import main

    code = 1
    try:
        signal.alarm(LONGEST)
        os.dup2(printed, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["hcsmoe", *arguments]
        prepare()
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
