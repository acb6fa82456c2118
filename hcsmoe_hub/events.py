"""What the library reports while it works; the command line renders these, the library never prints."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Stage(StrEnum):
    """The stages of a conversion, of an evaluation, of a recovery and of a push."""

    PLAN = "plan"
    CALIBRATION = "calibration"
    OBSERVE = "observe"
    CONVERT = "convert"
    MEASURE = "measure"
    REFIT = "refit"
    TEACHER = "teacher"
    RECOVER = "recover"
    VERIFY = "verify"
    EVALUATE = "evaluate"
    PUSH = "push"


@dataclass(frozen=True, slots=True)
class StageStarted:
    """A stage begins; ``total`` counts its steps: decoder layers while converting, sequences while measuring.

    ``detail`` says more in words, such as what it will write; mostly empty.
    """

    stage: Stage
    total: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class StageResumed:
    """A stage goes on where an interrupted run has left it; ``done`` counts the steps that are not done again."""

    stage: Stage
    done: int


@dataclass(frozen=True, slots=True)
class StageAdvanced:
    """One step of a stage is done; ``bytes_written`` is the running total."""

    stage: Stage
    detail: str = ""
    bytes_written: int = 0


@dataclass(frozen=True, slots=True)
class StageFinished:
    """A stage is done."""

    stage: Stage
    seconds: float


@dataclass(frozen=True, slots=True)
class Fetching:
    """A shard is about to be downloaded."""

    shard: str
    number: int
    total: int


@dataclass(frozen=True, slots=True)
class Warned:
    """An option could not be followed to the letter, or the result deserves a second look."""

    message: str


@dataclass(frozen=True, slots=True)
class Sending:
    """A file is being uploaded; ``bytes_sent`` counts retried bytes every time they are sent."""

    file: str
    file_bytes: int
    bytes_sent: int


@dataclass(frozen=True, slots=True)
class Delivered:
    """The Hub holds the content of a file, which is not visible before the commit.

    ``bytes_sent`` is 0 where the Hub held it already, and ``None`` where the Xet client, which does not report it, has
    sent the file.
    """

    file: str
    file_bytes: int
    bytes_sent: int | None


Event = StageStarted | StageResumed | StageAdvanced | StageFinished | Fetching | Warned | Sending | Delivered
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Ignores every event."""


class EventLog:
    """Passes events on, and keeps what reports record of them.

    Args:
        listener: Called with every event.
        warnings: Sentences that are passed on as warnings at once.

    Attributes:
        warnings: Messages of all warnings, in order.
        seconds: Time of every stage that is over, by its name.
    """

    def __init__(self, listener: Listener, warnings: Sequence[str] = ()) -> None:
        self._listener = listener
        self.warnings: list[str] = []
        self.seconds: dict[str, float] = {}
        self._running: StageStarted | None = None
        self._steps = 0
        # Of this run alone.
        self._emitted: list[str] = []
        self._begun, self._is_timed = 0.0, False
        # Of the runs before it.
        self._earlier: dict[str, float] = {}
        for message in warnings:
            self.emit(Warned(message))

    def emit(self, event: Event) -> None:
        """Passes an event on."""
        if isinstance(event, Warned):
            self.warnings.append(event.message)
            self._emitted.append(event.message)
        elif isinstance(event, StageStarted):
            self._running, self._steps = event, 0
        elif isinstance(event, StageResumed):
            self._steps = event.done
        elif isinstance(event, StageAdvanced):
            self._steps += 1
        self._listener(event)

    @property
    def place(self) -> str:
        """What is going on, as part of a sentence: ``in layer 3 (convert)``; empty before the first stage."""
        if self._running is None:
            return ""
        stage = self._running.stage
        if stage in (Stage.OBSERVE, Stage.CONVERT) and self._steps < self._running.total:
            return f"in layer {self._steps} ({stage})"
        return f"in stage '{stage}'"

    def kept(self) -> dict[str, Any]:
        """Warnings and times so far, as JSON; ``restore`` takes them in a run that goes on from here."""
        seconds = dict(self.seconds)
        if self._running is not None and self._is_timed:
            stage = self._running.stage.value
            seconds[stage] = self._spent(stage)
        return {"warnings": list(self.warnings), "seconds": seconds}

    def restore(self, warnings: Sequence[str], seconds: Mapping[str, float]) -> None:
        """Takes over what an earlier run had come to; a warning that both have is there once.

        Args:
            warnings: Its warnings.
            seconds: Its times.
        """
        self.warnings = [*warnings, *(message for message in self._emitted if message not in warnings)]
        self._earlier = dict(seconds)
        self.seconds = {**seconds, **self.seconds}

    def _spent(self, stage: str) -> float:
        return round(self._earlier.get(stage, 0.0) + time.perf_counter() - self._begun, 3)

    @contextmanager
    def timed(self, stage: Stage, total: int) -> Iterator[None]:
        """Announces a stage of so many steps, and its end, around a ``with`` block."""
        self.emit(StageStarted(stage, total))
        self._begun, self._is_timed = time.perf_counter(), True
        yield
        self.seconds[stage.value] = self._spent(stage.value)
        self._is_timed = False
        self.emit(StageFinished(stage, self.seconds[stage.value]))
