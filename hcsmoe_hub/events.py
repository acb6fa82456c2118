"""What the library reports while it works; the command line renders these, the library never prints."""

from collections.abc import Callable
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
