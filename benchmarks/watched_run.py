"""Starts the command ``hcsmoe convert`` in a process group of its own, watches its journal, and may kill it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

# Where a conversion notes every layer that a next run need not repeat, in its output folder.
JOURNAL = Path("hcsmoe.incomplete", "progress", "journal.jsonl")
# The line by which the command says that layers begin.
BEGINNING = ("observe      started", "convert      started")
LOOK_SECONDS = 0.02
OUTPUT = "result"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(slots=True, kw_only=True)
class Watched:
    """What was seen of one run.

    Attributes:
        status: Its exit status; negative after a signal.
        seconds: Wall time.
        cpu: CPU time of the process in seconds, as far as it was seen.
        began: CPU time when the first layer began; ``None`` if none did.
        commits: CPU time at which each line of the journal appeared; 0 for those of earlier runs.
        messages: Standard error.
    """

    status: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    began: float | None = None
    commits: list[float] = field(default_factory=list)
    messages: str = ""

    @property
    def was_killed(self) -> bool:
        """Whether it was still running when the signal came."""
        return self.status == -signal.SIGKILL

    @property
    def unsaved(self) -> float:
        """CPU seconds of layers that a next run has to repeat, had this one ended here."""
        last = self.commits[-1] if self.commits else 0.0
        return 0.0 if self.began is None else self.cpu - max(self.began, last)


def convert(
    folder: Path,
    words: Sequence[str],
    *,
    environment: Mapping[str, str] = ONE_THREAD,
    kill_after: float | None = None,
    delay: float = 0.0,
) -> Watched:
    """Runs the command, and kills its whole group at a moment of its CPU time.

    CPU time does not depend on what else the machine does, so moments are spread evenly over the work.

    Args:
        folder: Its current folder, where the result goes.
        words: Arguments of ``hcsmoe convert`` without the output.
        environment: Variables that are set for it.
        kill_after: CPU seconds; ``None`` lets it finish.
        delay: Wall seconds that the signal comes later, so that it also hits waits for the disk.
    """
    command = [sys.executable, "-P", "-m", "hcsmoe_hub.cli", "convert", *words, "--output", OUTPUT]
    log, seen, start = folder / "messages.txt", Watched(), time.perf_counter()
    with (folder / "printed.txt").open("wb") as printed, log.open("wb") as messages:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=printed,
            stderr=messages,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        looks = _Looks(psutil.Process(process.pid), folder / OUTPUT / JOURNAL, log, seen)
        while process.poll() is None:
            looks.look()
            if kill_after is not None and seen.cpu >= kill_after:
                _until(time.perf_counter() + delay, looks.look)
                # Its children as well, as the end of a machine would end them.
                _kill(process)
                break
            time.sleep(LOOK_SECONDS)
        seen.status = process.wait()
    seen.seconds = time.perf_counter() - start
    seen.messages = log.read_text(encoding="utf-8", errors="replace")
    return seen


def _until(moment: float, look: Callable[[], None]) -> None:
    while (left := moment - time.perf_counter()) > 0:
        time.sleep(min(left, LOOK_SECONDS))
        look()


def _kill(process: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        # It has just ended by itself.
        return


class _Looks:
    """Notes the CPU time at which things happen in a process.

    Args:
        process: The process.
        journal: Its journal, which may not be there.
        log: Its standard error.
        seen: Written to.
    """

    def __init__(self, process: psutil.Process, journal: Path, log: Path, seen: Watched) -> None:
        self._process = process
        self._journal = journal
        self._log = log
        self._seen = seen
        seen.commits = [0.0] * self._lines()

    def look(self) -> None:
        """Looks once."""
        try:
            times = self._process.cpu_times()
        except psutil.Error:
            # It ended between two looks.
            return
        # A process that has ended, but was not waited for, has none any more.
        self._seen.cpu = max(self._seen.cpu, times.user + times.system)
        self._seen.commits += [self._seen.cpu] * (self._lines() - len(self._seen.commits))
        if self._seen.began is None:
            messages = self._log.read_text(encoding="utf-8", errors="replace")
            if any(line in messages for line in BEGINNING):
                self._seen.began = self._seen.cpu

    def _lines(self) -> int:
        """Whole lines of the journal: a torn last one counts for nothing."""
        try:
            return self._journal.read_bytes().count(b"\n")
        except OSError:
            return 0
