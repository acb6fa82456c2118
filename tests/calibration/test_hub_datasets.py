"""Calibration text from the Hub: the real datasets client against a loopback server, in a process of its own."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hub_server import Hub
from places import EXAMPLE

LENGTH = 16

CLIENT = """
import json, sys
from pathlib import Path
from transformers import AutoTokenizer
from hcsmoe_hub import HcsmoeError
from hcsmoe_hub.calibration.plan import plan_calibration
from hcsmoe_hub.calibration.text import load_calibration
from hcsmoe_hub.options import CalibrationOptions

folder, calls = json.load(sys.stdin)
tokenizer, answers = AutoTokenizer.from_pretrained(folder), {}
for name, options in calls.items():
    try:
        chosen = CalibrationOptions(**options)
        plan = plan_calibration(chosen, max_positions=512, has_tokenizer=True, label="model", fits=False)
        ids = load_calibration(plan, tokenizer_folder=Path(folder), vocab_size=4096).token_ids
        flat = ids.flatten().tolist()
        answers[name] = {"shape": list(ids.shape), "text": tokenizer.decode(flat), "ids": flat}
    except HcsmoeError as error:
        answers[name] = {"message": error.message, "hint": error.hint}
json.dump(answers, sys.stdout)
"""


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train_sft
    path: sft.jsonl
  - split: train_gen
    path: gen.jsonl
- config_name: long
  data_files: long.jsonl
---
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub with the first shard of C4, a dataset of another shape, and one with configs and splits."""
    c4, notes, chats = (tmp_path_factory.mktemp(name) for name in ("c4", "notes", "chats"))
    (c4 / "en").mkdir()
    rows = [json.dumps({"text": f"page {number} speaks of page {number}", "url": "-"}) for number in range(50)]
    (c4 / "en" / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress("\n".join(rows).encode(), mtime=0))
    records = [json.dumps({"body": f"note {number} is a note", "id": number}) for number in range(50)]
    (notes / "train.jsonl").write_text("\n".join(records))
    (chats / "README.md").write_text(CARD)
    for name in ("sft", "gen", "long"):
        records = [json.dumps({"prompt": f"{name} {number}?", "completion": f"{name} it is"}) for number in range(50)]
        (chats / f"{name}.jsonl").write_text("\n".join(records))
    with Hub() as server:
        server.add("allenai/c4", c4, kind="datasets")
        server.add("org/notes", notes, kind="datasets")
        server.add("org/chats", chats, kind="datasets")
        yield server


@pytest.fixture(scope="module")
def answers(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process made of every dataset below."""
    common = {"samples": 4, "sequence_length": LENGTH}
    calls = {
        "c4": {"dataset": "c4", **common},
        "c4 again": {"dataset": "c4", **common},
        "c4 other seed": {"dataset": "c4", **common, "seed": 7},
        "named column": {"dataset": "org/notes", "text_column": "body", **common},
        "no column": {"dataset": "org/notes", **common},
        "unknown": {"dataset": "org/absent", **common},
        "no split": {"dataset": "org/chats", **common},
        "split": {"dataset": "org/chats:train_sft", **common},
        "config": {"dataset": "org/chats:long", **common},
        "config and split": {"dataset": "org/chats:default:train_gen", **common},
        "no such config": {"dataset": "org/chats:short:train", **common},
        "mixture": {"dataset": "org/notes=1,org/chats:train_sft=3", "text_column": None, **common},
        "mixed": {"dataset": "org/chats:long=1,org/chats:train_sft=3", **common},
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    home = str(tmp_path_factory.mktemp("home"))
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT],
        input=json.dumps([str(EXAMPLE), calls]),
        env={**inherited, **settings, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_c4_streams_its_first_shard_and_packs_it(answers: dict[str, Any]) -> None:
    assert answers["c4"]["shape"] == [4, LENGTH]
    assert "speaks of page" in answers["c4"]["text"]


def test_c4_is_shuffled_by_the_seed_alone(answers: dict[str, Any]) -> None:
    assert answers["c4"] == answers["c4 again"]
    assert answers["c4"]["ids"] != answers["c4 other seed"]["ids"]


def test_documents_of_c4_are_joined_without_a_separator(answers: dict[str, Any]) -> None:
    end_of_text = json.loads((EXAMPLE / "config.json").read_text())["eos_token_id"]
    assert end_of_text not in answers["c4"]["ids"]
    assert end_of_text in answers["named column"]["ids"]


def test_text_column_names_the_text_of_any_dataset(answers: dict[str, Any]) -> None:
    assert "is a note" in answers["named column"]["text"]


def test_dataset_without_a_known_column_lists_its_columns(answers: dict[str, Any]) -> None:
    assert "body, id" in answers["no column"]["message"]
    assert "`text_column`" in answers["no column"]["hint"]


def test_unknown_dataset_is_refused_with_its_name(answers: dict[str, Any]) -> None:
    assert "org/absent" in answers["unknown"]["message"]
    assert "bundled" in answers["unknown"]["hint"]


def test_a_missing_split_is_refused_with_those_that_exist(answers: dict[str, Any]) -> None:
    assert "no split 'train'; its splits are train_sft, train_gen" in answers["no split"]["message"]
    assert "`dataset='org/chats:train_sft'`" in answers["no split"]["hint"]


@pytest.mark.parametrize(("name", "word"), [("split", "sft"), ("config", "long"), ("config and split", "gen")])
def test_config_and_split_follow_the_id(answers: dict[str, Any], name: str, word: str) -> None:
    others = {"sft", "long", "gen"} - {word}
    assert f"{word} it is" in answers[name]["text"]
    assert [other for other in others if other in answers[name]["text"]] == []


def test_an_unknown_config_is_refused_with_those_that_exist(answers: dict[str, Any]) -> None:
    assert "has the configs default, long, but not 'short'" in answers["no such config"]["message"]


def test_configs_of_one_dataset_can_be_mixed(answers: dict[str, Any]) -> None:
    assert answers["mixed"]["shape"] == [4, LENGTH]
    assert all(word in answers["mixed"]["text"] for word in ("sft it is", "long it is"))


def test_a_mixture_names_the_source_that_has_no_text(answers: dict[str, Any]) -> None:
    assert answers["mixture"]["message"].startswith("org/notes has no text")
