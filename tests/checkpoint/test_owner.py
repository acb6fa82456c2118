"""One process at a time writes to a folder, whatever its file system grants."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hcsmoe_hub.checkpoint import owner as owner_module
from hcsmoe_hub.checkpoint.owner import OWNER, OwnedError, Owner, owning, read_owner

# Owns a folder until its input is closed.
OWNING = """
import sys
from pathlib import Path
from hcsmoe_hub.checkpoint.owner import owning
with owning(Path(sys.argv[1])):
    print("owning", flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_owner(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that owns a folder."""
    words = [sys.executable, "-c", OWNING, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "owning\n"
        yield process
        process.kill()


def grant_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets ``flock`` succeed for everybody, as it does on some shared file systems."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)


def share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the folder lie on a file system of several machines."""
    monkeypatch.setattr(owner_module, "_is_local", lambda _: False)


def leave(folder: Path, owner: Owner) -> None:
    """Leaves the name of an owner, as a killed process does."""
    (folder / OWNER).write_text(json.dumps(asdict(owner)))


def test_nothing_is_left_of_an_owner_that_has_ended(tmp_path: Path) -> None:
    with owning(tmp_path):
        found = read_owner(tmp_path)
        assert found is not None
        assert found.pid == os.getpid()
        assert found.is_visible
        assert found.runs
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_granted", [False, True], ids=["flock works", "flock lets everybody in"])
def test_a_second_owner_is_refused_with_the_name_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_granted: bool
) -> None:
    with other_owner(tmp_path) as process:
        if is_granted:
            grant_all(monkeypatch)
        with pytest.raises(OwnedError) as caught, owning(tmp_path):
            pass
        assert caught.value.is_certain
        assert caught.value.owner is not None
        assert caught.value.owner.pid == process.pid
        # The refusal has not changed whose it is.
        assert read_owner(tmp_path) == caught.value.owner


@pytest.mark.parametrize("is_granted", [False, True], ids=["flock works", "flock lets everybody in"])
def test_a_killed_owner_does_not_block_the_next_one_on_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_granted: bool
) -> None:
    with other_owner(tmp_path) as process:
        process.kill()
        process.wait()
    assert (tmp_path / OWNER).exists()
    if is_granted:
        grant_all(monkeypatch)
    with owning(tmp_path):
        found = read_owner(tmp_path)
        assert found is not None
        assert found.pid == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_another_process_has_now_is_not_mistaken_for_the_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grant_all(monkeypatch)
    leave(tmp_path, replace(Owner.of_this_process(), began=1))
    with owning(tmp_path):
        pass


def test_an_owner_on_another_machine_may_still_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share(monkeypatch)
    elsewhere = replace(Owner.of_this_process(), host="elsewhere", pid=7)
    leave(tmp_path, elsewhere)
    with pytest.raises(OwnedError) as caught, owning(tmp_path):
        pass
    assert not caught.value.is_certain
    assert caught.value.owner == elsewhere
    (tmp_path / OWNER).unlink()
    with owning(tmp_path):
        pass


EARLIER = Owner(host="earlier-container", space=1, pid=1, began=1, since="")


@pytest.mark.parametrize("name", [EARLIER, '{"host": "vm", '], ids=["container", "half"])
def test_on_a_local_disk_neither_a_killed_container_nor_half_a_name_blocks_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Owner | str
) -> None:
    monkeypatch.setattr(owner_module, "_is_local", lambda _: True)
    if isinstance(name, Owner):
        leave(tmp_path, name)
    else:
        (tmp_path / OWNER).write_text(name)
    with owning(tmp_path):
        pass


def test_a_file_system_without_locks_still_has_one_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with other_owner(tmp_path) as process:
        monkeypatch.setattr(fcntl, "flock", refuse)
        with pytest.raises(OwnedError), owning(tmp_path):
            pass
        process.kill()
        process.wait()
    with owning(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_find_the_same_dead_owner_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grant_all(monkeypatch)
    share(monkeypatch)
    leave(tmp_path, replace(Owner.of_this_process(), began=1))
    quicker = replace(Owner.of_this_process(), pid=os.getppid())

    def be_late(owner: Owner | None) -> None:
        leave(tmp_path, quicker)

    monkeypatch.setattr(owner_module, "_check_gone", be_late)
    with pytest.raises(OwnedError) as caught, owning(tmp_path):
        pass
    assert caught.value.owner == quicker
    assert read_owner(tmp_path) == quicker
