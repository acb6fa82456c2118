"""The move of a complete result: cut short at any moment, it never leaves a mixture, and the next run finishes it."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tiny_models import INDEX, contents

from hcsmoe_hub.checkpoint.unfinished import COMPLETE, UNFINISHED, is_complete, is_occupied, progress, staging
from hcsmoe_hub.errors import OutputError
from hcsmoe_hub.result.commit import commit_result, discard, finish_moves, remove_progress

OLD = {
    "config.json": b"old",
    INDEX: b"old",
    "model-00001-of-00003.safetensors": b"old",
    "model-00002-of-00003.safetensors": b"old",
    "model-00003-of-00003.safetensors": b"old",
    "hcsmoe.json": b"old",
    "tokenizer.json": b"old",
    "merges.txt": b"old",
    "chat_templates/old.jinja": b"old",
    "README.md": b"old",
}
MINE = {"notes.txt": b"mine", "below/mine.json": b"mine"}
NEW = {
    "config.json": b"new",
    INDEX: b"new",
    "model-00001-of-00002.safetensors": b"new",
    "model-00002-of-00002.safetensors": b"new",
    "hcsmoe.json": b"new",
    "tokenizer.json": b"new",
    "chat_templates/new.jinja": b"new",
    "README.md": b"new",
}
# Files that earlier versions, or other runs, have left.
LEFT = {
    "model-00009-of-00009.safetensors": b"left",
    "config.json.incomplete": b"left",
    "other.safetensors.index.json": b"left",
}


def fill(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def prepared(output: Path, old: dict[str, bytes]) -> Path:
    """An output folder with an old result, and a new one that is complete in its staging folder."""
    fill(output, old)
    fill(staging(output), NEW)
    fill(progress(output), {"journal.jsonl": b"{}"})
    return output


def visible(output: Path) -> dict[str, bytes]:
    """Everything but what is unfinished."""
    return {name: content for name, content in contents(output).items() if not name.startswith(UNFINISHED)}


class Cut(BaseException):
    """The end of a process."""


def cut(monkeypatch: pytest.MonkeyPatch, at: int) -> list[str]:
    """Ends the process before the n-th change of a name, and lists the changes before it."""
    done: list[str] = []

    def cutting(original: Any) -> Any:
        def change(path: Any, *others: Any, **settings: Any) -> Any:
            if len(done) == at:
                raise Cut
            done.append(str(path))
            return original(path, *others, **settings)

        return change

    monkeypatch.setattr(os, "replace", cutting(os.replace))
    monkeypatch.setattr(Path, "unlink", cutting(Path.unlink))
    monkeypatch.setattr(Path, "rmdir", cutting(Path.rmdir))
    monkeypatch.setattr(Path, "mkdir", cutting(Path.mkdir))
    monkeypatch.setattr(shutil, "rmtree", cutting(shutil.rmtree))
    return done


def is_cut(monkeypatch: pytest.MonkeyPatch, output: Path, at: int) -> bool:
    """Commits a result; whether that was cut short."""
    with monkeypatch.context() as patched:
        cut(patched, at)
        try:
            commit_result(output)
        except Cut:
            return True
    return False


@pytest.mark.parametrize("old", [{}, OLD | MINE | LEFT], ids=["an empty folder", "an old result"])
def test_a_move_that_is_cut_short_anywhere_leaves_no_mixture_and_is_finished_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: dict[str, bytes]
) -> None:
    kept = MINE if old else {}
    moments = 0
    while True:
        output = prepared(tmp_path / str(moments), old)
        if not is_cut(monkeypatch, output, moments):
            break
        moments += 1
        found = visible(output)
        if "config.json" in found:
            assert found in (old, NEW | kept)
        if is_complete(output):
            assert not is_occupied(output)
            # Cut short a second time, a little later.
            with monkeypatch.context() as patched, suppress(Cut):
                cut(patched, 2)
                finish_moves(output)
            if is_complete(output):
                finish_moves(output)
            assert visible(output) == NEW | kept
            assert not any((output / UNFINISHED).iterdir())
        else:
            assert found in (old, NEW | kept)
    assert moments > len(NEW)
    assert visible(output) == NEW | kept


@pytest.mark.parametrize("at", range(0, 40, 3))
def test_a_complete_result_that_is_given_up_leaves_only_what_is_not_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    output = prepared(tmp_path, MINE)
    is_cut(monkeypatch, output, at)
    if not is_complete(output):
        return
    discard(output)
    assert visible(output) == MINE
    assert not any((output / UNFINISHED).iterdir())


def test_the_journal_is_gone_before_the_files_that_it_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = prepared(tmp_path, {})
    for at in range(10):
        with monkeypatch.context() as patched:
            cut(patched, at)
            try:
                discard(output)
            except Cut:
                assert not progress(output).exists() or contents(staging(output)) == NEW
            else:
                return
    raise AssertionError("it never ended")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        '{"files": 3, "remove": []}',
        '{"files": ["../../x"], "remove": []}',
        '{"files": [], "remove": ["/etc/x"]}',
    ],
)
def test_a_damaged_list_moves_and_removes_nothing(tmp_path: Path, content: str) -> None:
    output = prepared(tmp_path, OLD)
    (output / UNFINISHED / COMPLETE).write_text(content)
    with pytest.raises(OutputError, match=r"complete\.json is damaged"):
        finish_moves(output)
    assert visible(output) == OLD
    assert contents(staging(output)) == NEW


def test_the_list_is_there_before_the_first_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = prepared(tmp_path, OLD)
    # The first change gives the list its name.
    assert is_cut(monkeypatch, output, 1)
    listed = json.loads((output / UNFINISHED / COMPLETE).read_text())
    assert listed["files"][-2:] == [INDEX, "config.json"]
    assert listed["remove"][:2] == ["config.json", INDEX]
    assert set(listed["remove"]) == OLD.keys() - {"README.md"}


def test_the_list_stays_while_a_result_is_to_be_pushed(tmp_path: Path) -> None:
    output = prepared(tmp_path, OLD)
    commit_result(output, is_pushed=True)
    kept = visible(output)
    assert kept.items() >= NEW.items()
    assert not staging(output).exists()
    assert not progress(output).exists()
    assert "run the same command again" in (output / UNFINISHED / "README.txt").read_text()
    # What appears in the meantime is not part of the older result.
    later = next(name for name in sorted(OLD) if name not in kept)
    (output / later).write_text("new")
    finish_moves(output)
    assert visible(output).keys() == kept.keys() | {later}
    assert is_complete(output)
    remove_progress(output)
    assert not any((output / UNFINISHED).iterdir())
