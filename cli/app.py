"""The ``hcsmoe`` application: its commands, and how errors are reported."""

import errno
import os
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from hcsmoe_hub.cli.architectures import architectures
from hcsmoe_hub.cli.card import card
from hcsmoe_hub.cli.convert import EXAMPLES, convert
from hcsmoe_hub.cli.curve import CURVE_EXAMPLES, curve
from hcsmoe_hub.cli.evaluate import evaluate
from hcsmoe_hub.cli.flags import with_flags
from hcsmoe_hub.cli.help_page import HelpGroup
from hcsmoe_hub.cli.inspect import inspect
from hcsmoe_hub.cli.libraries import warnings_hidden
from hcsmoe_hub.cli.output import Output, print_labelled, stderr_console
from hcsmoe_hub.cli.push import push
from hcsmoe_hub.cli.ranks import FirstCommand, SharedCommand, SingleCommand, is_launched
from hcsmoe_hub.cli.recover import RECOVER_EXAMPLES, recover
from hcsmoe_hub.cli.verify import verify
from hcsmoe_hub.errors import HcsmoeError, PlanError, kept_until, unpushed
from hcsmoe_hub.machine.signals import STOPPED, stopping_cleanly
from hcsmoe_hub.machine.versions import tool

DEBUG_VARIABLE = "HCSMOE_DEBUG"
# What stands for a word that is not printed.
SECRET = "..."

# Failures of the machine that a person can repair; every other OSError is a bug and keeps its traceback.
SYSTEM_HINTS: Mapping[int, str] = {
    errno.ENOSPC: "free some space, or choose another disk with --output or --cache-dir",
    errno.EDQUOT: "free some space, or choose another disk with --output or --cache-dir",
    errno.EFBIG: "allow larger files with 'ulimit -f unlimited', or write smaller ones with --max-shard-size",
    errno.EACCES: "check the permissions, or choose another folder",
    errno.EPERM: "check the permissions, or choose another folder",
    errno.EROFS: "choose a folder that can be written to",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "remove the links that lead to each other",
    errno.EMFILE: "allow this program more open files, for example with 'ulimit -n 4096'",
    errno.ENFILE: "close other programs: this machine has too many files open",
    errno.EIO: "check the disk, or choose another one with --output or --cache-dir",
    errno.ESTALE: "mount the network folder again, and run the same command again",
}


class _Commands(HelpGroup):
    """Runs a command and turns its known failures, and requests to stop, into one message and an exit code."""

    def main(self, args: Sequence[str] | None = None, *others: Any, **settings: Any) -> Any:
        """Keeps the words of the command line for a message that repeats them."""
        self._words = list(sys.argv[1:] if args is None else args)
        return super().main(args, *others, **settings)

    def invoke(self, ctx: Any) -> Any:
        _check_endpoint()
        with stopping_cleanly(_end_at_once):
            try:
                with warnings_hidden():
                    return super().invoke(ctx)
            except HcsmoeError as error:
                _fail(with_flags(error.message), with_flags(error.hint), go_on=self._going_on(error))
            except OSError as error:
                hint = SYSTEM_HINTS.get(error.errno or 0)
                if hint is None:
                    raise
                where = f": {error.filename}" if error.filename else ""
                _fail(f"{error.strerror}{where}.", hint, go_on=self._going_on(error))
            except KeyboardInterrupt as error:
                place, go_on = kept_until(error), self._going_on(error)
                console = stderr_console()
                if go_on is not None:
                    console.print(f"Interrupted {place}; what was done before is kept.", soft_wrap=True)
                    print_labelled(console, "Hint", "dim", go_on)
                elif (command := unpushed(error)) is not None:
                    console.print("Interrupted; the result is complete, but not pushed.")
                    print_labelled(console, "Hint", "dim", f"push it with '{command}'")
                else:
                    console.print("Interrupted.")
                raise typer.Exit(STOPPED) from None

    def _going_on(self, error: BaseException) -> str | None:
        """How a conversion or a recovery that has ended goes on; ``None`` if nothing of it is kept."""
        # Options that were refused are refused again.
        if kept_until(error) is None or isinstance(error, PlanError):
            return None
        start = "start all ranks again to go on, with" if is_launched() else "go on with"
        return f"{start}: {shlex.join(['hcsmoe', *_repeatable(self._words)])}"


def _repeatable(words: Sequence[str]) -> list[str]:
    """The words of a command that goes on where one with these words has ended, without a secret."""
    repeatable, is_secret = list[str](), False
    for word in words:
        name, equals, _ = word.partition("=")
        if is_secret:
            repeatable.append(SECRET)
        elif name == "--token" and equals:
            repeatable.append(f"{name}={SECRET}")
        elif word != "--restart":
            repeatable.append(word)
        is_secret = word == "--token"
    return repeatable


def _end_at_once() -> None:
    os.write(2, b"Interrupted again, and ended at once.\n")


def _check_endpoint() -> None:
    """Ends the command if HF_ENDPOINT is malformed: the Hub's client would not even be imported."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    try:
        _ = urlsplit(endpoint).port
    except ValueError as error:
        _fail(f"HF_ENDPOINT is {endpoint!r}, which is not an address: {error}.", "correct the variable, or unset it")


def _fail(message: str, hint: str, *, go_on: str | None = None) -> None:
    """Reports the failure that is being handled and how the work goes on, and ends the command."""
    console = stderr_console()
    if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        console.print(traceback.format_exc(), soft_wrap=True)
    print_labelled(console, "Error", "bold red", message)
    print_labelled(console, "Hint", "dim", hint)
    if go_on is not None:
        print_labelled(console, "Then", "dim", go_on)
    raise typer.Exit(1)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        Output().result(tool(), human=" ".join(tool().values()))
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Shrink Mixture-of-Experts checkpoints: prune or merge experts, without fine-tuning."""


app.command(cls=SharedCommand, epilog=EXAMPLES)(convert)
app.command(cls=SingleCommand, epilog=CURVE_EXAMPLES)(curve)
app.command(cls=SharedCommand, epilog=RECOVER_EXAMPLES)(recover)
app.command(cls=FirstCommand)(inspect)
app.command(cls=FirstCommand)(verify)
app.command(cls=SingleCommand)(evaluate)
for command in (card, push, architectures):
    app.command(cls=FirstCommand)(command)
