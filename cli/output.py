"""The only place that writes to the terminal: data on stdout, everything else on stderr."""

import json
from contextlib import AbstractContextManager, nullcontext
from enum import Enum, auto
from typing import Any, assert_never

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from hcsmoe_hub.cli.flags import with_flags

# Wide enough that no line is cut or wrapped when the output goes to a file or to another program.
PIPE_WIDTH = 1000
# Width of a drawing there: a wider one shows no more.
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
        # FORCE_COLOR makes rich call a pipe a terminal, but redrawn lines would garble it.
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
        # Tables pad their last column with blanks, which other programs would have to strip.
        self._write("\n".join(line.rstrip() for line in capture.get().splitlines()))

    def _write(self, line: str) -> None:
        self._stdout.file.write(f"{line}\n")
        self._stdout.file.flush()

    def warn(self, message: str) -> None:
        """Prints a warning on stderr."""
        if self.mode is not Mode.QUIET:
            print_labelled(self.stderr, "Warning", "yellow", with_flags(message))

    def hint(self, message: str) -> None:
        """Prints on stderr what a person could do next."""
        if self.mode is Mode.HUMAN:
            print_labelled(self.stderr, "Hint", "dim", message)

    def working(self, message: str) -> AbstractContextManager[object]:
        """Shows a spinner while work goes on, if a person is watching."""
        if not self.is_live:
            return nullcontext()
        return self.stderr.status(f"{message} ...", refresh_per_second=REFRESHES_PER_SECOND)


def _console() -> Console:
    console = Console(highlight=False, markup=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, emoji=False, width=PIPE_WIDTH)


def stderr_console() -> Console:
    """A console for messages; values in them are never interpreted as markup."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def print_labelled(console: Console, label: str, style: str, message: str) -> None:
    """Prints ``Label: message``; the terminal wraps long lines, so that they can be copied whole."""
    console.print(Text.assemble((f"{label}:", style), f" {message}"), soft_wrap=True)
