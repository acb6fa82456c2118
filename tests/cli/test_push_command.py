"""``hcsmoe push``: what a person, a program and a script see, and what goes wrong before any request."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_client import READER, SECRETS, WRITER, Machine
from hub_server import Account, Hub
from rich.console import Console

from hcsmoe_hub.cli.output import Output
from hcsmoe_hub.cli.push import watching
from hcsmoe_hub.events import Delivered, Sending, Warned

# Runs the command several times in one process, whose environment names the server.
PROGRAM = """
import json
import sys

from typer.testing import CliRunner

from hcsmoe_hub.cli.app import app

done = {}
for name, words in json.load(sys.stdin).items():
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200", "NO_COLOR": "1"}, prog_name="hcsmoe")
    done[name] = [result.exit_code, result.stdout, result.stderr]
json.dump(done, sys.stdout)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    accounts = {WRITER: Account(name="me", role="write"), READER: Account(name="reader", role="read")}
    with Hub(tokens=accounts) as server:
        yield server


@pytest.fixture(scope="module")
def done(hub: Hub, converted: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of several pushes."""
    folder = str(converted[0])
    (converted[0] / "notes.txt").write_text("mine")
    words = {
        "person": ["push", folder, "me/model"],
        "program": ["push", folder, "me/model-json", "--private", "--json"],
        "script": ["push", folder, "me/model-quiet", "--revision", "four", "-q"],
        "proposal": ["push", folder, "me/model-pr", "--create-pr"],
        "again": ["push", folder, "me/model", "--json"],
        "reader": ["push", folder, "reader/model", "--token", READER],
    }
    machine = Machine(tmp_path_factory.mktemp("machine"))
    found = machine.run(hub.url, words, ("-c", PROGRAM), HF_TOKEN=WRITER, HCSMOE_DEBUG="1")  # type: ignore[arg-type]
    (converted[0] / "notes.txt").unlink()
    return {name: (code, stdout, stderr) for name, (code, stdout, stderr) in found.items()}


def test_a_person_sees_what_went_where(hub: Hub, done: Any) -> None:
    code, stdout, stderr = done["person"]
    commit = hub.model("me/model").refs["main"]
    lines = [" ".join(line.split()) for line in stdout.splitlines()]
    assert code == 0
    assert lines[0] == "✓ me/model is on the Hub"
    assert lines[1] == f"commit {hub.url}/me/model/commit/{commit}"
    assert lines[2] == "repository public, main"
    assert lines[3].startswith("files ")
    assert lines[3].endswith(" sent")
    assert lines[4] == "left out notes.txt: not part of the checkpoint"
    said = [line.split(maxsplit=1) for line in stderr.splitlines()]
    assert said[0] == ["push", "started"]
    assert said[1][1].startswith("model.safetensors sent, 3.")
    assert said[2][1].startswith("done in ")
    assert said[3] == ["Hint:", "load it with AutoModelForCausalLM.from_pretrained('me/model')"]


def test_a_program_gets_one_document(hub: Hub, done: Any) -> None:
    code, stdout, _ = done["program"]
    document = json.loads(stdout)
    assert code == 0
    assert document["commit"] == hub.model("me/model-json").refs["main"]
    assert document["private"] is hub.model("me/model-json").private is True
    assert set(document["files"]) == hub.model("me/model-json").contents().keys() - {".gitattributes"}
    assert document["bytes"] == document["bytes_sent"] > 3_000_000


def test_a_script_gets_the_address_of_the_commit(hub: Hub, done: Any) -> None:
    url = f"{hub.url}/me/model-quiet/commit/{hub.model('me/model-quiet').refs['four']}"
    assert done["script"] == (0, f"{url}\n", "")


def test_a_proposal_is_named_as_one(hub: Hub, done: Any) -> None:
    code, stdout, stderr = done["proposal"]
    assert code == 0
    assert "me/model-pr has a pull request" in stdout
    assert f"{hub.url}/me/model-pr/discussions/1" in stdout
    assert "from_pretrained" not in stderr


def test_the_same_push_again_changes_nothing(done: Any) -> None:
    code, stdout, _ = done["again"]
    document = json.loads(stdout)
    assert (code, document["changed"], document["bytes_sent"]) == (0, False, 0)


def test_a_refusal_is_a_message_and_a_hint(done: Any) -> None:
    code, stdout, stderr = done["reader"]
    assert (code, stdout) == (1, "")
    # The token is in no traceback either: see below.
    assert stderr.startswith("Traceback")
    assert "\nError: the access token of reader is read-only" in stderr
    assert "\nHint: create one with write access on " in stderr


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_per_shard() -> None:
    sink, file = Output(), Terminal()
    sink.stderr = Console(file=file, force_terminal=True, width=100, markup=False, highlight=False)
    with watching(sink) as listener:
        listener(Sending("one.safetensors", 4_000_000, 1_000_000))
        listener(Warned("something odd."))
        listener(Sending("one.safetensors", 4_000_000, 5_000_000))
        listener(Delivered("two.safetensors", 2_000_000, 0))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    last = [line.split() for line in text.replace("\r", "\n").rstrip().splitlines()[-2:]]
    assert [(line[0], line[2]) for line in last] == [("one.safetensors", "4.0/4.0"), ("two.safetensors", "2.0/2.0")]
    assert "Warning: something odd." in text


def test_no_output_holds_a_token(done: Any) -> None:
    everything = "".join(stdout + stderr for _, stdout, stderr in done.values())
    assert [secret for secret in SECRETS if secret in everything] == []


def test_a_push_without_the_hub_is_refused(run: Any, converted: Any) -> None:
    result = run("push", converted[0], "me/model", HF_TOKEN=WRITER)
    assert (result.code, result.stdout) == (1, "")
    assert result.stderr == "Error: offline mode is on (HF_HUB_OFFLINE).\nHint: unset HF_HUB_OFFLINE and push again\n"


def test_a_word_that_is_no_repository_is_refused(run: Any, converted: Any) -> None:
    result = run("push", converted[0], "my model")
    assert result.code == 1
    assert "'my model' is not a repository id" in result.stderr


def test_one_output_at_a_time(run: Any, tmp_path: Path) -> None:
    assert run("push", tmp_path, "me/model", "--json", "--quiet").code == 2


def test_help_imports_no_heavy_library() -> None:
    code = (
        "import sys\nfrom hcsmoe_hub.cli import main\nsys.argv = ['hcsmoe', 'push', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('heavy:', sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"
