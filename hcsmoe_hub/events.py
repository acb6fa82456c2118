"""What the library reports while it works; the command line renders these, the library never prints."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """The stages of a conversion, in order."""

    PLAN = "plan"
    CALIBRATION = "calibration"
    OBSERVE = "observe"
    CONVERT = "convert"
    MEASURE = "measure"
    REFIT = "refit"
    VERIFY = "verify"
    EVALUATE = "evaluate"
    PUSH = "push"


@dataclass(frozen=True, slots=True)
class StageStarted:
    """A stage begins; ``total`` counts its steps: decoder layers while converting, sequences while measuring."""

    stage: Stage
    total: int


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


Event = StageStarted | StageAdvanced | StageFinished | Fetching | Warned | Sending | Delivered
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
        for message in warnings:
            self.emit(Warned(message))

    def emit(self, event: Event) -> None:
        """Passes an event on."""
        if isinstance(event, Warned):
            self.warnings.append(event.message)
        self._listener(event)

    @contextmanager
    def timed(self, stage: Stage, total: int) -> Iterator[None]:
        """Announces a stage of so many steps, and its end, around a ``with`` block."""
        self.emit(StageStarted(stage, total))
        start = time.perf_counter()
        yield
        self.seconds[stage.value] = round(time.perf_counter() - start, 3)
        self.emit(StageFinished(stage, self.seconds[stage.value]))
