"""Whole results: which files of a folder are pushed, what it replaces, and that it comes back bit for bit."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_client import PUSHER, WRITER, Answers, Call, Machine
from hub_server import Account, Hub
from tiny_models import INDEX, build, options

from hcsmoe_hub import convert
from hub.folders import read_folder

CARD = "---\nlicense: mit\n---\n# Mine\n"
BESIDE = {"notes.txt": "mine", ".cache/huggingface/x.lock": "", "plots/loss.png": "PNG"}
# What the repositories hold that a result is pushed over: parts of another checkpoint, and a user's own files.
OLD_PARTS = ("model-00001-of-00099.safetensors", "pytorch_model.bin", "hcsmoe-evaluation.json", "merges.txt")
OLD_OWN = ("README.md", "images/plot.png", "model.gguf")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint of several shards, with a card and unrelated files."""
    folder = tmp_path_factory.mktemp("result")
    source = build(folder / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "LICENSE").write_text("Apache")
    convert(source, options(source, 4, output=folder / "made", max_shard_size="60KB"))
    for name, text in {"README.md": CARD, ".eval_results/x.yaml": "[]", **BESIDE}.items():
        (folder / "made" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "made" / name).write_text(text)
    return folder / "made"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    old = tmp_path_factory.mktemp("old")
    for name in (*OLD_PARTS, *OLD_OWN):
        (old / name).parent.mkdir(exist_ok=True)
        (old / name).write_text(f"old {name}")
    (old / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    (old / ".gitignore").write_text("*.safetensors\n")
    with Hub(tokens={WRITER: Account(name="me", role="write")}) as server:
        for repo_id in ("me/old", "me/proposed"):
            server.add(repo_id, old)
        yield server


def push(folder: Path, repo_id: str, **how: bool) -> Call:
    return {"action": "push", "folder": str(folder), "repo_id": repo_id, "token": WRITER, **how}


def damaged(folder: Path, result: Path) -> dict[str, Path]:
    """Folders without a complete result."""
    names = ("a checkpoint", "a lost shard", "an unfinished shard", "a stray shard")
    copies = {name: Path(shutil.copytree(result, folder / name)) for name in names}
    (copies["a checkpoint"] / "hcsmoe.json").unlink()
    next(copies["a lost shard"].glob("*.safetensors")).unlink()
    (copies["an unfinished shard"] / "model-00009-of-00009.safetensors.incomplete").touch()
    (copies["a stray shard"] / "old.safetensors").touch()
    return copies | {"nothing": folder / "nothing"}


@pytest.fixture(scope="module")
def answers(hub: Hub, result: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    folder = tmp_path_factory.mktemp("damaged")
    calls: dict[str, Call | list[Call]] = {name: push(path, "me/x") for name, path in damaged(folder, result).items()}
    calls["twice"] = [push(result, "me/twice"), push(result, "me/twice")]
    calls["over"] = push(result, "me/old", overwrite=True)
    calls["proposed"] = push(result, "me/proposed", overwrite=True, create_pr=True)
    return Machine(tmp_path_factory.mktemp("machine")).run(hub.url, calls, (PUSHER,))


@pytest.fixture(scope="module")
def pushed(result: Path) -> dict[str, bytes]:
    """The files that belong to the result."""
    return {name: content for name, content in read_folder(result).items() if name not in BESIDE}


def test_a_pushed_result_comes_back_bit_for_bit(
    hub: Hub, answers: Answers, pushed: dict[str, bytes], tmp_path: Path
) -> None:
    call = {"action": "download", "repo_id": "me/twice"}
    downloaded = Path(Machine(tmp_path).run(hub.url, {"it": call}, (PUSHER,))["it"])
    assert {name: content for name, content in read_folder(downloaded).items() if name != ".gitattributes"} == pushed
    assert sum(name.endswith(".safetensors") for name in pushed) > 2


def test_unrelated_files_stay_local_and_are_listed(answers: Answers, pushed: dict[str, bytes]) -> None:
    assert answers["twice"][0]["files"] == sorted(pushed)
    assert answers["twice"][0]["left_out"] == ["notes.txt", "plots/loss.png"]
    assert {INDEX, "config.json", "tokenizer.json", "LICENSE", ".eval_results/x.yaml"} <= pushed.keys()


def test_the_same_push_again_sends_nothing_and_makes_no_commit(hub: Hub, answers: Answers) -> None:
    first, second = answers["twice"]
    assert (second["changed"], second["bytes_sent"]) == (False, 0)
    assert second["commit"] == first["commit"] == hub.model("me/twice").refs["main"]
    assert len(hub.model("me/twice").commits) == 2


def test_a_replaced_checkpoint_leaves_no_part_behind(hub: Hub, answers: Answers, pushed: dict[str, bytes]) -> None:
    contents = hub.model("me/old").contents()
    assert answers["over"]["deleted"] == sorted(OLD_PARTS)
    assert contents.keys() == pushed.keys() | {*OLD_OWN, ".gitattributes", ".gitignore"}
    assert {name: contents[name] for name in pushed} == pushed
    assert len(hub.model("me/old").commits) == 2


def test_a_gitignore_of_the_repository_keeps_no_shard_out(hub: Hub, answers: Answers) -> None:
    assert any(name.endswith(".safetensors") for name in hub.model("me/old").contents())


def test_a_proposed_replacement_is_one_pull_request(hub: Hub, answers: Answers, pushed: dict[str, bytes]) -> None:
    repository = hub.model("me/proposed")
    assert set(repository.refs) == {"main", "refs/pr/1"}
    assert set(OLD_PARTS) <= repository.contents().keys()
    assert repository.contents("refs/pr/1").keys() & set(OLD_PARTS) == set()
    assert repository.contents("refs/pr/1").keys() >= pushed.keys()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a checkpoint", "has no hcsmoe.json, so it is not a result of 'hcsmoe convert'"),
        ("a lost shard", "lacks 1 of"),
        ("an unfinished shard", "holds unfinished files: model-00009-of-00009.safetensors.incomplete"),
        ("a stray shard", "holds shards that its index does not list: old.safetensors"),
        ("nothing", "there is no folder"),
    ],
)
def test_an_incomplete_result_is_refused(name: str, message: str, hub: Hub, answers: Answers) -> None:
    assert message in answers[name]["message"]
    assert ("models", "me/x") not in hub.repositories


def test_the_events_of_a_push_have_a_beginning_and_an_end(answers: Answers, pushed: dict[str, bytes]) -> None:
    kinds = [kind for kind, _ in answers["twice"][0]["events"]]
    assert (kinds[0], kinds[-1]) == ("StageStarted", "StageFinished")
    assert kinds.count("Delivered") == sum(name.endswith(".safetensors") for name in pushed)


def test_the_report_is_pushed_as_it_was_written(hub: Hub, answers: Answers, result: Path) -> None:
    stored = json.loads(hub.model("me/twice").contents()["hcsmoe.json"])
    assert stored == json.loads((result / "hcsmoe.json").read_text())
