"""Groups of options: one value for the command, single options for the command line."""

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from hcsmoe_hub.cli.groups import grouped


@dataclass(frozen=True, kw_only=True)
class Size:
    """Two options, one of them required, one of a type that only its parser knows."""

    width: Annotated[int, typer.Option("--width")]
    marks: Annotated[tuple[str, ...] | None, typer.Option("--marks", parser=lambda text: tuple(text.split("+")))] = None


@pytest.fixture
def call():
    """Runs a command with a group, and returns what reached it, or the exit code."""
    seen = []
    app = typer.Typer()

    @app.command()
    @grouped
    def command(name: Annotated[str, typer.Argument()], *, size: Size, loud: Annotated[bool, typer.Option()] = False):
        seen.append((name, size, loud))

    def run(*words):
        code = CliRunner().invoke(app, list(words)).exit_code
        return seen.pop() if code == 0 else code

    return run


def test_options_reach_the_command_as_one_value(call):
    assert call("box", "--width", "3") == ("box", Size(width=3), False)
    assert call("box", "--width", "3", "--marks", "a+b", "--loud") == ("box", Size(width=3, marks=("a", "b")), True)


def test_option_without_default_is_required(call):
    assert call("box") == 2


def test_option_keeps_its_type(call):
    assert call("box", "--width", "wide") == 2


def test_two_options_of_one_name_are_a_bug():
    def command(*, size: Size, width: Annotated[int, typer.Option()]):
        """Never run."""

    with pytest.raises(ValueError, match="duplicate parameter name"):
        grouped(command)
