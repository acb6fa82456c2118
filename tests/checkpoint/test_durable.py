"""Files are complete and on the disk when they have their names."""

import errno
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from hcsmoe_hub.checkpoint.durable import copy_file, sync_folder, sync_tree, write_bytes, write_file


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the disk, in order."""
    found: list[str] = []
    fsync, replace = os.fsync, os.replace

    def syncing(file: int) -> None:
        found.append(f"sync {Path(os.readlink(f'/proc/self/fd/{file}')).name}")
        fsync(file)

    def renaming(old: Path, new: Path) -> None:
        found.append(f"rename to {Path(new).name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", renaming)
    return found


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_afterwards(tmp_path: Path, steps: list[str]) -> None:
    write_bytes(tmp_path / "report", b"content")
    assert steps == ["sync report.incomplete", "rename to report", f"sync {tmp_path.name}"]
    assert (tmp_path / "report").read_bytes() == b"content"


def test_a_copy_is_written_in_the_same_way(tmp_path: Path, steps: list[str]) -> None:
    (tmp_path / "source").write_bytes(bytes(range(256)) * 1000)
    copy_file(tmp_path / "source", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "source").read_bytes()
    assert steps == ["sync copy.incomplete", "rename to copy", f"sync {tmp_path.name}"]


def test_a_file_that_cannot_be_written_is_as_it_was(tmp_path: Path) -> None:
    def fill(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "report").write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "report", fill)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"report": b"old"}


def test_everything_below_a_folder_is_brought_to_the_disk(tmp_path: Path, steps: list[str]) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "one").touch()
    (tmp_path / "two").touch()
    sync_tree(tmp_path)
    assert sorted(steps) == ["sync below", "sync one", f"sync {tmp_path.name}", "sync two"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_fsync_of_folders_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(file: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    sync_folder(tmp_path)


def test_a_disk_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)
