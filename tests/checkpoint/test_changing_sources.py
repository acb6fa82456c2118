"""A folder that changes, or whose file system fails, while it is read: one message, and nothing wrong is read."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import build, options

from hcsmoe_hub import convert
from hcsmoe_hub.checkpoint import open_files
from hcsmoe_hub.checkpoint import reader as reader_module
from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import SourceError

MOST_OPEN = 32


def write(folder: Path, name: str, **tensors: list[float]) -> Path:
    save_file({key: torch.tensor(values) for key, values in tensors.items()}, folder / name)
    return folder / name


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return [
        write(tmp_path, f"model-0000{number}-of-00002.safetensors", **{f"a{number}": [1.0], f"b{number}": [2.0]})
        for number in (1, 2)
    ]


@pytest.fixture
def source(shards: list[Path]) -> LocalSource:
    found = LocalSource(shards[0].parent)
    assert list(found.tensors) == ["a1", "b1", "a2", "b2"]
    return found


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def replace(path: Path) -> None:
    write(path.parent, "new", a2=[3.0], b2=[4.0])
    os.replace(path.parent / "new", path)
    touch(path)


CHANGES: dict[str, Callable[[Path], None]] = {
    "has changed since": touch,
    "of .* has changed since its header": replace,
    "has changed from [0-9]+ to 10 bytes": lambda path: os.truncate(path, 10),
    "cannot be opened any more: No such file": lambda path: path.unlink(),
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_shard_that_changes_before_it_is_read_is_refused(
    message: str, source: LocalSource, shards: list[Path]
) -> None:
    with TensorReader(source) as reader:
        reader.read(source.tensors["a1"])
        CHANGES[message](shards[1])
        with pytest.raises(SourceError, match=message) as raised:
            reader.read(source.tensors["a2"])
    assert "run the same command again" in raised.value.hint or "`restart=True`" in raised.value.hint


def test_a_shard_that_changes_while_it_is_open_is_refused_with_its_last_tensor(
    source: LocalSource, shards: list[Path]
) -> None:
    with TensorReader(source) as reader:
        reader.read(source.tensors["a1"])
        touch(shards[0])
        with pytest.raises(SourceError, match="has changed since its header was read"):
            reader.read(source.tensors["b1"])


def test_a_checkpoint_that_cannot_be_written_to_is_read(source: LocalSource, shards: list[Path]) -> None:
    folder = shards[0].parent
    before = {path: path.stat().st_mtime_ns for path in (folder, *shards)}
    for path in (*shards, folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    with TensorReader(source) as reader:
        assert [reader.read(tensor).item() for tensor in source.tensors.values()] == [1.0, 2.0, 1.0, 2.0]
    assert {path: path.stat().st_mtime_ns for path in (folder, *shards)} == before
    folder.chmod(0o755)


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, module: object, name: str, times: int) -> Iterator[None]:
    """Lets a function of ``os`` fail as it does when a network file system has lost a file."""
    sound, left = getattr(os, name), [times]

    def fail(*arguments: object) -> object:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return sound(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(f"{module.__name__}.os.{name}", fail)  # type: ignore[attr-defined]
        yield


def test_a_file_that_a_network_file_system_lost_is_opened_again(
    source: LocalSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TensorReader(source) as reader, failing(monkeypatch, open_files, "open", 1):
        assert reader.read(source.tensors["a1"]).item() == 1.0


def test_a_read_that_fails_is_one_message(source: LocalSource, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        TensorReader(source) as reader,
        failing(monkeypatch, reader_module, "preadv", 1),
        pytest.raises(SourceError, match="cannot be read: Stale file handle"),
    ):
        reader.read(source.tensors["a1"])


def open_below(folder: Path) -> set[str]:
    """Files of a folder that this process has open."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            found.add(os.readlink(link))
        except FileNotFoundError:
            continue
    return {name for name in found if name.startswith(str(folder))}


def test_a_shard_is_closed_after_its_last_tensor(source: LocalSource, shards: list[Path]) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("only Linux lists the open files of a process")
    with TensorReader(source) as reader:
        for name, expected in (("a1", {shards[0]}), ("a2", set(shards)), ("b1", {shards[1]}), ("b2", set())):
            reader.read(source.tensors[name])
            assert open_below(shards[0].parent) == set(map(str, expected))


def test_a_conversion_of_many_shards_opens_few_files_at_a_time(tmp_path: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("only Linux lists the open files of a process")
    folder = build(tmp_path / "source", max_shard_size="5KB", num_hidden_layers=8)
    assert len(list(folder.glob("*.safetensors"))) >= 60
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.0005):
            most[0] = max(most[0], len(open_below(tmp_path)))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        convert(folder, options(folder, 4, output=tmp_path / "result", max_shard_size="5KB"))
    finally:
        stop.set()
        thread.join()
    assert len(list((tmp_path / "result").glob("*.safetensors"))) >= 40
    assert 0 < most[0] <= MOST_OPEN
