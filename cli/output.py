"""The one place that writes to the terminal: data on stdout, everything else on stderr."""

import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from enum import Enum, auto
from statistics import fmean
from typing import Any, assert_never

import typer
from rich.console import Console, RenderableType
from rich.text import Text

# Wide enough that no line is cut or wrapped when the output goes to a file or to another program.
PIPE_WIDTH = 1000
# What a drawing is given there: it grows with its width, and is no better for it.
PAGE_WIDTH = 100
# A person cannot read faster, and the work needs the processor more than its display does.
REFRESHES_PER_SECOND = 4


class Mode(Enum):
    """Who reads stdout."""

    HUMAN = auto()
    JSON = auto()
    QUIET = auto()


class Output:
    """The sink of one command.

    Args:
        as_json: Print one JSON document.
        quiet: Print only what a script needs, and nothing on stderr but errors.

    Attributes:
        mode: Who reads stdout.
        stderr: Console for progress.

    Raises:
        typer.BadParameter: If both were asked for.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        if as_json and quiet:
            raise typer.BadParameter("cannot be combined with --json.", param_hint="--quiet")
        self.mode = Mode.JSON if as_json else Mode.QUIET if quiet else Mode.HUMAN
        self.stderr = stderr_console()
        self._stdout = _console()

    @property
    def is_live(self) -> bool:
        """Whether a person watches stderr, so that lines may be redrawn."""
        # FORCE_COLOR makes rich call a pipe a terminal; redrawn lines have no place in it all the same.
        return self.mode is not Mode.QUIET and self.stderr.is_interactive and self.stderr.file.isatty()

    @property
    def is_ascii(self) -> bool:
        """Whether stdout can show letters, digits and little else."""
        return self._stdout.options.ascii_only

    @property
    def drawing_width(self) -> int:
        """Characters per line for a drawing: those of the terminal, or what a page holds."""
        return self._stdout.width if self._stdout.is_terminal else PAGE_WIDTH

    @property
    def check_mark(self) -> str:
        """Sign of success, in what the terminal can show."""
        return "OK" if self.is_ascii else "✓"

    def result(self, document: Any, *, human: RenderableType, brief: str = "") -> None:
        """Prints the data of a command, once.

        Args:
            document: JSON values, for ``--json``.
            human: The same for a person.
            brief: The same for ``--quiet``.
        """
        match self.mode:
            case Mode.HUMAN:
                self._show(human)
            case Mode.JSON:
                self._write(json.dumps(document))
            case Mode.QUIET:
                self._write(brief)
            case _:
                assert_never(self.mode)

    def _show(self, human: RenderableType) -> None:
        if self._stdout.is_terminal:
            self._stdout.print(human)
            return
        with self._stdout.capture() as capture:
            self._stdout.print(human)
        # Tables fill their last column with blanks, which would be in the way of other programs.
        self._write("\n".join(line.rstrip() for line in capture.get().splitlines()))

    def _write(self, line: str) -> None:
        self._stdout.file.write(f"{line}\n")
        self._stdout.file.flush()

    def warn(self, message: str) -> None:
        """Says on stderr that something deserves a second look."""
        if self.mode is not Mode.QUIET:
            print_labelled(self.stderr, "Warning", "yellow", message)

    def hint(self, message: str) -> None:
        """Says on stderr what a person could do next."""
        if self.mode is Mode.HUMAN:
            print_labelled(self.stderr, "Hint", "dim", message)

    def working(self, message: str) -> AbstractContextManager[object]:
        """Shows that something goes on, while it goes on and if a person is there to see it."""
        if not self.is_live:
            return nullcontext()
        return self.stderr.status(f"{message} ...", refresh_per_second=REFRESHES_PER_SECOND)


def _console() -> Console:
    console = Console(highlight=False, markup=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, emoji=False, width=PIPE_WIDTH)


def stderr_console() -> Console:
    """A console for messages; the values in them are never read as markup."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def print_labelled(console: Console, label: str, style: str, message: str) -> None:
    """Prints ``Label: message``; long lines are left to the terminal, so that they can be copied."""
    console.print(Text.assemble((f"{label}:", style), f" {message}"), soft_wrap=True)


def format_mean(values: Iterable[float | None], *, digits: int = 3) -> str:
    """Mean of the values that are defined; a dash if none is."""
    defined = [value for value in values if value is not None]
    return f"{fmean(defined):.{digits}f}" if defined else "-"


def format_plural(number: int, noun: str) -> str:
    """A number with its noun: ``1 shard``, ``2 shards``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_change(change: Mapping[str, int]) -> str:
    """How much less (or more) ``after`` is than ``before``: ``-48.3 %``; empty if they are equal."""
    before, after = change["before"], change["after"]
    return "" if before == after else f"{100 * (after / before - 1):+.1f} %"


def format_seconds(seconds: float) -> str:
    """A duration in its two largest units: ``6 min 40 s``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
