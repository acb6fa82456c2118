"""The folder of unfinished downloads: it belongs to one run, and a later one takes it over."""

import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from hcsmoe_hub.hub import download_folder as module
from hcsmoe_hub.hub.download_folder import IDLE_SECONDS, download_folder, remove_left


def interrupt(parent: Path, name: str, *files: str) -> None:
    """The files that a failed run leaves."""
    with suppress(KeyboardInterrupt), download_folder(parent, name, files) as folder:
        for file in files:
            (folder / file).write_text(file)
        raise KeyboardInterrupt


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    return tmp_path / "parent"


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leftover(parent: Path, name: str) -> Path:
    """A folder of that name with a file."""
    (parent / name).mkdir(parents=True)
    (parent / name / "wanted").write_text("wanted")
    return parent / name


def ended_process() -> int:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    return int(done.stdout)


def test_a_folder_is_deleted_after_a_success(parent: Path) -> None:
    with download_folder(parent, "commit", []) as folder:
        assert folder.parent == parent
        (folder / "file").touch()
    assert not parent.exists()


def test_the_next_run_resumes_what_it_wants_and_removes_the_rest(parent: Path) -> None:
    interrupt(parent, "commit", "wanted", "other")
    with download_folder(parent, "commit", ["wanted", "more"]) as folder:
        assert files_of(folder) == ["wanted"]
        assert files_of(parent) == [folder.name]
    assert not parent.exists()


def test_the_leftovers_of_another_commit_are_removed(parent: Path) -> None:
    interrupt(parent, "older", "wanted")
    with download_folder(parent, "commit", ["wanted"]) as folder:
        assert files_of(parent) == [folder.name]
        assert files_of(folder) == []
    assert not parent.exists()


def test_what_ended_runs_have_left_is_removed(parent: Path) -> None:
    interrupt(parent, "commit", "wanted")
    with download_folder(parent, "other", []) as folder:
        interrupt(parent, "commit", "wanted")
        remove_left(parent)
        assert files_of(parent) == [folder.name]
    assert not parent.exists()


def test_two_runs_at_once_have_folders_of_their_own(parent: Path) -> None:
    with download_folder(parent, "commit", ["file"]) as one:
        (one / "file").touch()
        with download_folder(parent, "commit", ["file"]) as other:
            assert one != other
            assert not any(other.iterdir())
        assert not other.exists()
        assert (one / "file").exists()
    assert not parent.exists()


def test_the_largest_of_several_leftovers_is_resumed(parent: Path) -> None:
    for number, size in enumerate((1, 3, 2)):
        (leftover(parent, f"commit.{number}.left") / "wanted").write_bytes(bytes(size))
    with download_folder(parent, "commit", ["wanted"]) as folder:
        assert (folder / "wanted").stat().st_size == 3
        assert files_of(parent) == [folder.name]


def test_the_folder_of_a_killed_process_is_taken_over(parent: Path) -> None:
    leftover(parent, f"commit.0123.{platform.node().replace('.', '-')}.{ended_process()}")
    with download_folder(parent, "commit", ["wanted"]) as folder:
        assert files_of(folder) == ["wanted"]
        assert files_of(parent) == [folder.name]


def test_the_folder_of_an_earlier_process_of_the_same_number_is_taken_over(parent: Path) -> None:
    leftover(parent, f"commit.0123.{platform.node().replace('.', '-')}.{os.getpid()}")
    with download_folder(parent, "commit", ["wanted"]) as folder:
        assert files_of(folder) == ["wanted"]


@pytest.mark.parametrize("machine", ["elsewhere", platform.node().replace(".", "-")])
def test_the_folder_of_a_process_that_may_be_running_is_left_alone_until_it_is_idle(machine: str, parent: Path) -> None:
    other = leftover(parent, f"commit.0123.{machine}.{os.getppid()}")
    with download_folder(parent, "commit", ["wanted"]) as folder:
        assert files_of(folder) == []
    assert files_of(other) == ["wanted"]
    before = time.time() - IDLE_SECONDS - 10
    os.utime(other, (before, before))
    with download_folder(parent, "commit", ["wanted"]) as folder:
        assert files_of(folder) == ["wanted"]
    assert not parent.exists()


def test_a_running_process_shows_that_it_is_alive(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOUCH_SECONDS", 0.01)
    with download_folder(parent, "commit", []) as folder:
        os.utime(folder, (0, 0))
        deadline = time.monotonic() + 30
        while folder.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert folder.stat().st_mtime > 0


def test_a_run_whose_folder_was_taken_ends_without_it(parent: Path) -> None:
    with suppress(FileNotFoundError), download_folder(parent, "commit", []) as folder:
        os.rename(folder, parent / "commit.0123.elsewhere.1")
    assert files_of(parent) == ["commit.0123.elsewhere.1"]
