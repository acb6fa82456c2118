"""The folder of unfinished downloads: it belongs to one process, and a later one resumes it."""

from contextlib import suppress
from pathlib import Path

from hcsmoe_hub.hub.download_folder import download_folder


def interrupt(parent: Path, name: str, *files: str) -> None:
    """The files that a failed run leaves."""
    with suppress(KeyboardInterrupt), download_folder(parent, name, files) as folder:
        for file in files:
            (folder / file).write_text(file)
        raise KeyboardInterrupt


def test_a_folder_is_deleted_after_a_success(tmp_path: Path) -> None:
    with download_folder(tmp_path / "parent", "commit", []) as folder:
        assert folder == tmp_path / "parent" / "commit"
        (folder / "file").touch()
    assert not (tmp_path / "parent").exists()


def test_the_next_run_resumes_what_it_wants_and_removes_the_rest(tmp_path: Path) -> None:
    interrupt(tmp_path / "parent", "commit", "wanted", "other")
    assert (tmp_path / "parent" / "commit" / "other").exists()
    with download_folder(tmp_path / "parent", "commit", ["wanted", "more"]) as folder:
        assert [file.read_text() for file in folder.iterdir()] == ["wanted"]
    assert not (tmp_path / "parent").exists()


def test_the_leftovers_of_another_commit_are_removed(tmp_path: Path) -> None:
    interrupt(tmp_path / "parent", "older", "wanted")
    with download_folder(tmp_path / "parent", "commit", ["wanted"]):
        assert not (tmp_path / "parent" / "older").exists()
    assert not (tmp_path / "parent").exists()


def test_two_runs_at_once_have_folders_of_their_own(tmp_path: Path) -> None:
    with download_folder(tmp_path / "parent", "commit", ["file"]) as one:
        (one / "file").touch()
        with download_folder(tmp_path / "parent", "commit", ["file"]) as other:
            assert one != other
            assert not any(other.iterdir())
        assert not other.exists()
        assert (one / "file").exists()
    assert not (tmp_path / "parent").exists()
