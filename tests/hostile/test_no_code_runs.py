"""No command runs code that a checkpoint brings along, wherever it lies and whatever names it."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import EXAMPLE
from tiny_models import build, change_config
from typer.testing import CliRunner

from hcsmoe_hub.cli.app import app
from hostile.hostile_results import sound_report

MODULES = (
    "evil.py",
    "configuration_evil.py",
    "modeling_evil.py",
    "modeling_hcsmoe.py",
    "tokenization_evil.py",
    "processing_evil.py",
    # What Python, or a library that is named like this, would import from the current folder.
    "sitecustomize.py",
    "json.py",
    "torch.py",
    "transformers.py",
    "hcsmoe_hub.py",
    "custom_generate/generate.py",
    "encoding/encode.py",
)
TURNS = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "hello to you"}]
COMMANDS = {
    "convert": ("convert", ".", "--experts", "4", "--device", "cpu", "--calibration", "ids.npy", "--output", "../out"),
    "convert from conversations": (
        *("convert", ".", "--experts", "4", "--device", "cpu", "--calibration", "chats.jsonl", "--output", "../out"),
        *("--sequence-length", "16", "--samples", "2"),
    ),
    "like": ("convert", ".", "--like", ".", "--device", "cpu", "--calibration", "ids.npy", "--output", "../out"),
    "curve": ("curve", ".", "--experts", "4", "--device", "cpu", "--calibration", "ids.npy"),
    "inspect": ("inspect", "."),
    "verify": ("verify", "."),
    "evaluate": ("evaluate", ".", "--perplexity", "text.jsonl", "--device", "cpu"),
    "card": ("card", "."),
    "push": ("push", ".", "someone/something"),
}


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._path,))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer, and texts to calibrate and to measure on."""
    folder = build(tmp_path_factory.mktemp("sound") / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, folder)
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 64, (4, 16)))
    (folder / "chats.jsonl").write_text((json.dumps({"messages": TURNS}) + "\n") * 20)
    (folder / "text.jsonl").write_text('{"text": "some words of a text to measure on"}\n' * 20)
    return folder


@pytest.fixture
def hostile(sound: Path, tmp_path: Path) -> Path:
    """The same with code in every place that any library looks at; ``owned`` appears where it runs."""
    folder, owned = tmp_path / "model", tmp_path / "owned"
    shutil.copytree(sound, folder)
    code = f"open({str(owned)!r}, 'w').close()\n"
    for name in MODULES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    for name in ("pytorch_model.bin", "training_args.bin", "scheduler.pt", "model.ckpt"):
        (folder / name).write_bytes(pickle.dumps(Payload(owned)))
    change_config(
        folder,
        auto_map={
            "AutoConfig": "configuration_evil.Config",
            "AutoModelForCausalLM": "modeling_evil.Model",
            "AutoTokenizer": ["tokenization_evil.Tokenizer", None],
        },
        attn_implementation="evil/kernels",
        experts_implementation="evil/kernels",
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["tokenization_evil.Tokenizer", "tokenization_evil.Tokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
        "{% if cycler %}{{ cycler.__init__.__globals__.os.system('touch ' + 'owned') }}{% endif %}"
    )
    (folder / "generation_config.json").write_text(json.dumps({"custom_generate": "custom_generate"}))
    (folder / "hcsmoe.json").write_text(json.dumps(sound_report()))
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_runs_code_of_a_checkpoint(hostile: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # The worst place to be.
    monkeypatch.chdir(hostile)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    CliRunner().invoke(app, COMMANDS[name], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert not (hostile.parent / "owned").exists()
    assert not (hostile / "owned").exists()


def test_the_code_would_run_if_something_called_it(hostile: Path) -> None:
    exec((hostile / "evil.py").read_text())
    assert (hostile.parent / "owned").exists()
    (hostile.parent / "owned").unlink()
    pickle.loads((hostile / "pytorch_model.bin").read_bytes())
    assert (hostile.parent / "owned").exists()


def test_code_is_copied_and_not_run(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hostile)
    result = CliRunner().invoke(app, COMMANDS["convert"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    assert (hostile.parent / "out" / "modeling_evil.py").read_bytes() == (hostile / "modeling_evil.py").read_bytes()
    assert not (hostile.parent / "out" / "pytorch_model.bin").exists()
    assert not (hostile.parent / "owned").exists()
