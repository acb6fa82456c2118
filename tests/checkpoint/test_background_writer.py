"""A writer on a thread of its own: the same files, bounded memory, and no error that goes unnoticed."""

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tiny_models import differing, read_tensors
from torch import Tensor

from hcsmoe_hub.checkpoint.background_writer import BackgroundWriter
from hcsmoe_hub.checkpoint.writer import ShardLayout, ShardWriter, lay_out

HOST = torch.device("cpu")


def many(count: int = 12) -> dict[str, Tensor]:
    """Matrices of 400 bytes, each with different numbers."""
    return {f"layers.{number}.weight": torch.full((10, 10), float(number)) for number in range(count)}


def plan(tensors: Mapping[str, Tensor]) -> ShardLayout:
    outputs = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    return lay_out(outputs, max_shard_size="1.2KB")


class Gate:
    """Lets a writer write a tensor only when it is opened, and fails if it is asked to."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.failure: Exception | None = None
        self.shards: list[str] = []

    def wait_for_space(self) -> None:
        self.opened.wait()
        if self.failure is not None:
            raise self.failure

    def take(self, shard: Path) -> None:
        self.shards.append(shard.name)


def test_everything_is_written_when_the_block_ends(tmp_path: Path) -> None:
    tensors = many() | {"empty": torch.empty(0)}
    shards = ShardWriter(tmp_path, plan(tensors))
    with BackgroundWriter(shards, HOST, most_bytes=1000) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    shards.finish()
    assert differing(read_tensors(tmp_path), tensors) == []
    assert writer.bytes_taken == shards.bytes_written == sum(tensor.nbytes for tensor in tensors.values())


def test_the_caller_goes_on_while_tensors_wait_and_stops_when_too_many_do(tmp_path: Path) -> None:
    tensors, gate = many(4), Gate()
    with BackgroundWriter(ShardWriter(tmp_path, plan(tensors), gate), HOST, most_bytes=1000) as writer:
        names = iter(tensors)
        for _ in range(2):
            name = next(names)
            writer.write(name, tensors[name])
        third = threading.Thread(target=lambda: [writer.write(name, tensors[name]) for name in names])
        third.start()
        third.join(0.05)
        assert third.is_alive()
        assert writer.bytes_taken == 800
        gate.opened.set()
        third.join()
        writer.settle()
        assert writer.bytes_taken == 1600
        assert gate.shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_a_tensor_that_is_larger_than_what_may_wait_is_written_alone(tmp_path: Path) -> None:
    tensors = many(3)
    shards = ShardWriter(tmp_path, plan(tensors))
    with BackgroundWriter(shards, HOST, most_bytes=1) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    assert shards.bytes_written == 1200


@pytest.mark.parametrize("waits", ["settle", "write", "end"])
def test_what_goes_wrong_on_the_thread_is_raised_by_the_next_call(waits: str, tmp_path: Path) -> None:
    tensors, gate = many(2), Gate()
    gate.failure = OSError("no space left")
    first, second = tensors

    def convert() -> None:
        with BackgroundWriter(ShardWriter(tmp_path, plan(tensors), gate), HOST, most_bytes=400) as writer:
            writer.write(first, tensors[first])
            gate.opened.set()
            if waits == "settle":
                writer.settle()
            elif waits == "write":
                writer.write(second, tensors[second])

    with pytest.raises(OSError, match="no space left"):
        convert()


def test_a_failure_elsewhere_leaves_what_waits_unwritten(tmp_path: Path) -> None:
    tensors, gate = many(3), Gate()
    shards = ShardWriter(tmp_path, plan(tensors), gate)

    def convert() -> None:
        with BackgroundWriter(shards, HOST, most_bytes=1000) as writer:
            for name in list(tensors)[:2]:
                writer.write(name, tensors[name])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert()
    shards.close()
    # Only now does the thread go on, as after an upload that took its time.
    gate.opened.set()
    for thread in threading.enumerate():
        if thread.name == "writer":
            thread.join()
    assert list(tmp_path.iterdir()) == []
    assert shards.bytes_written == 0


# Tasks between tensors


def test_a_task_runs_when_all_that_was_handed_over_before_it_is_written(tmp_path: Path) -> None:
    tensors, found = many(4), list[tuple[int, bool]]()
    shards = ShardWriter(tmp_path, plan(tensors))
    with BackgroundWriter(shards, HOST, most_bytes=10_000) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
            writer.after(lambda: found.append((shards.bytes_written, threading.current_thread().name == "writer")))
    assert found == [(400, True), (800, True), (1200, True), (1600, True)]


def test_a_task_that_fails_is_raised_by_the_next_call(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError("no space left")

    def convert() -> None:
        with BackgroundWriter(ShardWriter(tmp_path, plan(many(1))), HOST, most_bytes=1000) as writer:
            writer.after(fail)

    with pytest.raises(OSError, match="no space left"):
        convert()


def test_a_task_that_waits_is_not_begun_once_the_writer_is_given_up(tmp_path: Path) -> None:
    tensors, gate, begun = many(1), Gate(), list[int]()

    def convert() -> None:
        with BackgroundWriter(ShardWriter(tmp_path, plan(tensors), gate), HOST, most_bytes=1000) as writer:
            writer.write("layers.0.weight", tensors["layers.0.weight"])
            writer.after(lambda: begun.append(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert()
    gate.opened.set()
    assert begun == []
