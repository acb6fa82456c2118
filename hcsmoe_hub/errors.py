"""Failures a user can cause or meet, each with what happened, why, and what to do.

Messages, hints and warnings name options by their fields, in backticks: `` `overwrite` ``, or with a value
`` `saliency='reap'` ``. That is how a Python user types them; the command line shows its own options in their place.
"""

import re

# An option in a message: the name of the field, and the value if there is one.
OPTION = re.compile(r"`([a-z_]+)(?:=([^`]+))?`")


class HcsmoeError(Exception):
    """A known failure: shown as one message without a traceback, exit code 1.

    Args:
        message: What happened, with the real values, and why it matters.
        hint: What to do next, as one imperative sentence.
        option: Name of the option that caused it; by default the first one that the message or else the hint names.

    Attributes:
        message: What happened.
        hint: What to do next.
        option: Name of the field of the options, or of the argument, to change; ``None`` if no option is the cause.
    """

    def __init__(self, message: str, *, hint: str, option: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        named = OPTION.search(message) or OPTION.search(hint)
        self.option = option or (named[1] if named else None)
        # Python shows it below the message.
        self.add_note(f"Hint: {hint}")


_KEPT = "What was done is kept, and the same options go on: it ended "


def note_kept(error: BaseException, place: str) -> None:
    """Adds to what ended a conversion that its work is kept, which Python shows below the message.

    Args:
        error: What ended it; any exception.
        place: Where it was, such as ``in layer 3 (convert)``.
    """
    error.add_note(f"{_KEPT}{place or 'at the beginning'}.")


def kept_until(error: BaseException) -> str | None:
    """Where a conversion was whose work is kept; ``None`` if nothing is."""
    notes: list[str] = getattr(error, "__notes__", [])
    found = [note for note in notes if note.startswith(_KEPT)]
    return found[0].removeprefix(_KEPT).removesuffix(".") if found else None


_UNPUSHED = "The result is complete, but not pushed; this pushes it: "


def note_unpushed(error: BaseException, command: str) -> None:
    """Adds to what ended a push which command pushes the result, which Python shows below the message.

    Args:
        error: What ended it; any exception.
        command: The command.
    """
    error.add_note(f"{_UNPUSHED}{command}")


def unpushed(error: BaseException) -> str | None:
    """The command that pushes a result whose push has ended early; ``None`` if no push has."""
    notes: list[str] = getattr(error, "__notes__", [])
    found = [note for note in notes if note.startswith(_UNPUSHED)]
    return found[0].removeprefix(_UNPUSHED) if found else None


class SourceError(HcsmoeError):
    """The source checkpoint cannot be found, reached or trusted."""


class UnsupportedModelError(HcsmoeError):
    """The checkpoint is sound but not one that this tool converts."""


class PlanError(HcsmoeError):
    """The options are wrong, or do not fit each other or the checkpoint."""


class OutOfMemoryError(HcsmoeError):
    """Memory of this machine or of its accelerator ran out, and no smaller piece of the work was possible."""


class CalibrationError(HcsmoeError):
    """The calibration data cannot be turned into tokens."""


class OutputError(HcsmoeError):
    """The result cannot be written where it should go."""


class VerificationError(HcsmoeError):
    """A written checkpoint does not hold what it promises."""
