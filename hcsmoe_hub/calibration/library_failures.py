"""Failures of libraries that interpret what other people wrote: tokenizers, chat templates, data files."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

from hcsmoe_hub.errors import CalibrationError, HcsmoeError

PACKAGE = __name__.partition(".")[0]
# A panic of a Rust library is not an Exception to Python.
_RUST = "pyo3_runtime"
# What Jinja calls the file of a template that came as a text.
_TEMPLATE = "<template>"


class RejectedError(CalibrationError):
    """The chat template of the model fails on a conversation."""


class LibraryFailures(AbstractContextManager[None]):
    """Turns whatever a library raises inside the ``with`` block into one known failure.

    A tokenizer and a chat template are programs that the checkpoint brings along, and a data file has an author too.
    What is wrong with them can surface as any kind of exception: tokenizers raises plain ``Exception``, a template
    divides by zero. What a line of this package raises is not the file's fault and passes through, and so do interrupts
    and a lack of memory, unless it was a template that asked for too much.

    Args:
        explain: Makes the failure to raise from the library's.
    """

    def __init__(self, explain: Callable[[BaseException], HcsmoeError]) -> None:
        self._explain = explain

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or not _comes_from_library(traceback):
            return
        if isinstance(error, MemoryError) and not _comes_from_template(traceback):
            return
        if isinstance(error, Exception) or type(error).__module__ == _RUST:
            raise self._explain(error) from error


def _comes_from_library(traceback: TracebackType | None) -> bool:
    """Whether the innermost frame of a traceback belongs to another package."""
    name = ""
    while traceback is not None:
        name = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return name.partition(".")[0] != PACKAGE


def _comes_from_template(traceback: TracebackType | None) -> bool:
    """Whether the innermost frame of a traceback belongs to a compiled template of Jinja."""
    file = ""
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        traceback = traceback.tb_next
    return file == _TEMPLATE


def reason_of(error: BaseException) -> str:
    """The first line of an error that says something, or the name of its kind; a missing key says nothing alone."""
    printable = str(error).encode("utf-8", "backslashreplace").decode()
    lines = (line.strip() for line in printable.splitlines())
    kind = type(error).__name__
    line = next((line for line in lines if line), kind).rstrip(":")
    return f"{kind}: {line}" if isinstance(error, KeyError) else line


def rejection(error: BaseException) -> RejectedError:
    """The failure of a chat template on one conversation."""
    return RejectedError(reason_of(error), hint="check the rows, or name another column with `text_column`")
