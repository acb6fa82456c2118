"""Runs the installed command in this process and keeps one real conversion for all tests that need a result."""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from places import EXAMPLE
from typer.testing import CliRunner

from hcsmoe_hub.cli.app import app

# Wide enough that help never wraps a line; no variable of this shell reaches a command.
ENVIRONMENT = {"COLUMNS": "200", "NO_COLOR": "1", "HF_TOKEN": "", "HCSMOE_DEBUG": ""}
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str
    exception: BaseException | None

    @property
    def everything(self) -> str:
        """All that was printed."""
        return self.stdout + self.stderr

    def document(self) -> Any:
        """The JSON document on stdout."""
        return json.loads(self.stdout)


Run = Callable[..., Finished]


def _run(*words: str | Path, **variables: str) -> Finished:
    result = CliRunner().invoke(app, [str(word) for word in words], env=ENVIRONMENT | variables, prog_name="hcsmoe")
    stdout, stderr = (ANSI.sub("", text) for text in (result.stdout, result.stderr))
    return Finished(result.exit_code, stdout, stderr, result.exception)


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs ``hcsmoe`` with the given words; keywords are environment variables."""
    return _run


@pytest.fixture(scope="session")
def example() -> Path:
    """The example model: 4 layers, 8 experts, 2 per token."""
    return EXAMPLE


@pytest.fixture(scope="session")
def measuring(example: Path) -> list[str]:
    """Words of a conversion to 4 experts on little text, measured as any other."""
    return shlex.split(
        f"convert {shlex.quote(str(example))} --experts 4 --preset hc-smoe --samples 2 --sequence-length 64"
    )


@pytest.fixture(scope="session")
def quick(measuring: list[str]) -> list[str]:
    """The same, done in a moment: held-out text is much longer than what these calibrate on."""
    return [*measuring, "--no-measure"]


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory, measuring: list[str]) -> tuple[Path, Finished]:
    """A converted checkpoint, and what the command printed with ``--json``."""
    folder = tmp_path_factory.mktemp("converted") / "result"
    return folder, _run(*measuring, "--output", folder, "--json")
