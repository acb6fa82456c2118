"""However many files are read, only a few are open."""

import os
import resource
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hcsmoe_hub.checkpoint.open_files import MOST, OpenFiles
from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.checkpoint.source import LocalSource


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Files that contain their own numbers."""
    paths = [tmp_path / str(number) for number in range(4 * MOST)]
    for path in paths:
        path.write_text(path.name)
    return paths


def open_here(folder: Path) -> list[str]:
    """Files of a folder that this process has open."""
    links = Path("/proc/self/fd")
    if not links.is_dir():
        pytest.skip("only Linux lists the open files of a process")
    found = []
    for link in links.iterdir():
        try:
            found.append(os.readlink(link))
        except FileNotFoundError:  # That of the listing itself.
            continue
    return [name for name in found if name.startswith(str(folder))]


def read(opened: OpenFiles, path: Path) -> str:
    with opened.reading(path) as file:
        return os.pread(file, 10, 0).decode()


def test_files_are_reopened_when_they_are_needed_again(files: list[Path], tmp_path: Path) -> None:
    opened = OpenFiles()
    for path in [*files, *files]:
        assert read(opened, path) == path.name
        assert len(open_here(tmp_path)) <= MOST
    opened.close_all()
    assert open_here(tmp_path) == []


def test_the_files_that_were_read_last_stay_open(files: list[Path], tmp_path: Path) -> None:
    opened = OpenFiles()
    for path in files:
        read(opened, path)
        read(opened, files[0])
    assert set(open_here(tmp_path)) == {str(path) for path in [files[0], *files[-MOST + 1 :]]}
    opened.close_all()


def test_a_file_that_is_being_read_stays_open(files: list[Path], tmp_path: Path) -> None:
    opened = OpenFiles()
    with ExitStack() as stack:
        held = [stack.enter_context(opened.reading(path)) for path in files]
        assert [os.pread(file, 10, 0).decode() for file in held] == [path.name for path in files]
    assert len(open_here(tmp_path)) == MOST
    opened.close_all()


def test_one_file_is_closed_before_it_is_deleted(files: list[Path], tmp_path: Path) -> None:
    opened = OpenFiles()
    read(opened, files[0])
    opened.close(files[0])
    opened.close(files[1])
    assert open_here(tmp_path) == []


def test_several_threads_read_what_they_asked_for(files: list[Path]) -> None:
    opened, start = OpenFiles(), threading.Barrier(8)

    def read_all(offset: int) -> bool:
        start.wait()
        return all(read(opened, path) == path.name for path in (files[offset:] + files[:offset]) * 20)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read_all, range(8)))
    opened.close_all()


@pytest.fixture
def few_files() -> Iterator[None]:
    """Lets this process open a few files more than it has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open("/dev/null", os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 3 * MOST, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_checkpoint_of_more_shards_than_a_process_may_open_is_read(tmp_path: Path, few_files: None) -> None:
    for number in range(1, 101):
        save_file({f"t{number}": torch.tensor([number])}, tmp_path / f"model-{number:05}-of-00100.safetensors")
    source = LocalSource(tmp_path)
    with TensorReader(source) as reader:
        assert all(reader.read(source.tensors[f"t{number}"]).item() == number for number in range(1, 101))
