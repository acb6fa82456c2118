"""The ``hcsmoe`` application: its commands, and how errors are reported."""

import errno
import os
import traceback
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from hcsmoe_hub.cli.architectures import architectures
from hcsmoe_hub.cli.card import card
from hcsmoe_hub.cli.convert import EXAMPLES, convert
from hcsmoe_hub.cli.curve import CURVE_EXAMPLES, curve
from hcsmoe_hub.cli.evaluate import evaluate
from hcsmoe_hub.cli.flags import with_flags
from hcsmoe_hub.cli.help_page import HelpCommand, HelpGroup
from hcsmoe_hub.cli.inspect import inspect
from hcsmoe_hub.cli.libraries import warnings_hidden
from hcsmoe_hub.cli.output import Output, print_labelled, stderr_console
from hcsmoe_hub.cli.push import push
from hcsmoe_hub.cli.verify import verify
from hcsmoe_hub.errors import HcsmoeError
from hcsmoe_hub.machine.versions import tool

DEBUG_VARIABLE = "HCSMOE_DEBUG"
INTERRUPTED = 130

# Failures of the machine that a person can repair; every other OSError is a bug and keeps its traceback.
SYSTEM_HINTS: Mapping[int, str] = {
    errno.ENOSPC: "free some space, or choose another disk with --output or --cache-dir",
    errno.EDQUOT: "free some space, or choose another disk with --output or --cache-dir",
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
    """Runs a command and turns its known failures into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        _check_endpoint()
        try:
            with warnings_hidden():
                return super().invoke(ctx)
        except HcsmoeError as error:
            _fail(with_flags(error.message), with_flags(error.hint))
        except OSError as error:
            hint = SYSTEM_HINTS.get(error.errno or 0)
            if hint is None:
                raise
            where = f": {error.filename}" if error.filename else ""
            _fail(f"{error.strerror}{where}.", hint)
        except KeyboardInterrupt:
            stderr_console().print("Interrupted.")
            raise typer.Exit(INTERRUPTED) from None


def _check_endpoint() -> None:
    """Ends the command if HF_ENDPOINT is malformed: the Hub's client would not even be imported."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    try:
        _ = urlsplit(endpoint).port
    except ValueError as error:
        _fail(f"HF_ENDPOINT is {endpoint!r}, which is not an address: {error}.", "correct the variable, or unset it")


def _fail(message: str, hint: str) -> None:
    """Reports the failure that is being handled, and ends the command."""
    console = stderr_console()
    if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        console.print(traceback.format_exc(), soft_wrap=True)
    print_labelled(console, "Error", "bold red", message)
    print_labelled(console, "Hint", "dim", hint)
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


app.command(cls=HelpCommand, epilog=EXAMPLES)(convert)
app.command(cls=HelpCommand, epilog=CURVE_EXAMPLES)(curve)
for command in (inspect, verify, evaluate, card, push, architectures):
    app.command(cls=HelpCommand)(command)
