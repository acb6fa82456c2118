"""Failures a user can cause or meet, each with what happened, why, and what to do."""


class HcsmoeError(Exception):
    """A known failure: shown as one message without a traceback, exit code 1.

    Args:
        message: What happened, with the real values, and why it matters.
        hint: What to do next, as one imperative sentence.
    """

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class SourceError(HcsmoeError):
    """The source checkpoint cannot be found, reached or trusted."""


class UnsupportedModelError(HcsmoeError):
    """The checkpoint is sound but not one that this tool converts."""


class PlanError(HcsmoeError):
    """The options and the checkpoint do not fit together."""


class CalibrationError(HcsmoeError):
    """The calibration data cannot be turned into tokens."""


class OutputError(HcsmoeError):
    """The result cannot be written where it was asked for."""


class VerificationError(HcsmoeError):
    """A written checkpoint does not hold what it promises."""
