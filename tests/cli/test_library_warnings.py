"""What other libraries have to say about code stays off the terminal; errors do not."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from architectures import save_tiny
from tiny_models import change_config

from hcsmoe_hub.cli import inspect as command
from hcsmoe_hub.cli.libraries import warnings_hidden


@pytest.fixture
def talkative(tmp_path: Path) -> Path:
    """A model over whose config transformers warns about its own future."""
    save_tiny("kimi_linear", tmp_path / "model")
    change_config(tmp_path / "model", rope_scaling=None)
    return tmp_path / "model"


def test_a_command_shows_no_warning_of_a_library(talkative: Path) -> None:
    def inspect(*options: str) -> list[str]:
        code = "from hcsmoe_hub.cli import main; main()"
        words = [sys.executable, "-P", *options, "-c", code, "inspect", str(talkative)]
        quiet = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=quiet)
        assert "KimiLinear" in done.stdout
        return [line for line in done.stderr.splitlines() if not line.startswith("Hint: ")]

    assert inspect() == []
    assert any("FutureWarning: `rope_scaling` is deprecated" in line for line in inspect("-W", "default"))


def test_warnings_are_hidden_while_a_command_runs(run, example, monkeypatch, recwarn) -> None:
    def warn(source, *, moe_layers):
        warnings.warn("change your code", FutureWarning, stacklevel=1)
        return original(source, moe_layers=moe_layers)

    original = command.source_line
    monkeypatch.setattr(command, "source_line", warn)
    assert run("inspect", example).code == 0
    assert [str(found.message) for found in recwarn] == []
    warnings.warn("change your code", FutureWarning, stacklevel=1)
    assert [str(found.message) for found in recwarn] == ["change your code"]


def test_a_user_who_asks_python_for_warnings_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    with pytest.warns(FutureWarning, match="change"), warnings_hidden():
        warnings.warn("change", FutureWarning, stacklevel=1)


def test_errors_are_not_hidden(run, tmp_path) -> None:
    (tmp_path / "config.json").write_text("{")
    result = run("inspect", tmp_path)
    assert result.code == 1
    assert result.stderr.startswith("Error: ")
