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


class SourceError(HcsmoeError):
    """The source checkpoint cannot be found, reached or trusted."""


class UnsupportedModelError(HcsmoeError):
    """The checkpoint is sound but not one that this tool converts."""


class PlanError(HcsmoeError):
    """The options are wrong, or do not fit each other or the checkpoint."""


class CalibrationError(HcsmoeError):
    """The calibration data cannot be turned into tokens."""


class OutputError(HcsmoeError):
    """The result cannot be written where it should go."""


class VerificationError(HcsmoeError):
    """A written checkpoint does not hold what it promises."""
