"""Shards are planned byte by byte, filled from any thread in any order, and named only when they are complete."""

import hashlib
import json
import os
import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import differing, read_tensors
from torch import Tensor

from hcsmoe_hub.checkpoint.durable import write_json
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.checkpoint.tensors import DTYPES, INDEX_FILE, PAIRS, SINGLE_FILE
from hcsmoe_hub.checkpoint.writer import ShardLayout, ShardWriter, lay_out
from hcsmoe_hub.errors import OutputError
from hcsmoe_hub.machine.allocator import bytes_of


def plan(tensors: Mapping[str, Tensor], *, max_shard_size: str = "5GB") -> ShardLayout:
    """The layout of some tensors, in their order."""
    outputs = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    return lay_out(outputs, max_shard_size=max_shard_size)


def write(folder: Path, tensors: Mapping[str, Tensor], *, max_shard_size: str = "5GB") -> ShardLayout:
    """Writes tensors in their order."""
    layout = plan(tensors, max_shard_size=max_shard_size)
    writer = ShardWriter(folder, layout)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()
    return layout


def every_dtype() -> dict[str, Tensor]:
    """A vector of odd length, a scalar and two tensors without elements of every dtype, narrow and wide ones mixed."""
    tensors: dict[str, Tensor] = {}
    for number, (name, dtype) in enumerate(sorted(DTYPES.items())):
        content = torch.arange(number, number + 3 * dtype.itemsize, dtype=torch.uint8)
        if dtype is torch.bool:
            content %= 2
        tensors[f"{name}.vector"] = content.view(dtype)
        if dtype in PAIRS:
            # safetensors has no scalar of half a byte, and reads an empty tensor of these with another shape.
            continue
        tensors[f"{name}.scalar"] = content[: dtype.itemsize].clone().view(dtype).view(())
        tensors[f"{name}.empty"] = torch.empty(0, dtype=dtype)
        tensors[f"{name}.no_rows"] = torch.empty(2, 0, 4, dtype=dtype)
    return tensors


def many(count: int = 40) -> dict[str, Tensor]:
    """Matrices of 400 bytes, each with different numbers."""
    return {f"layers.{number}.weight": torch.full((10, 10), float(number)) for number in range(count)}


# What is written


def test_every_dtype_and_shape_is_read_back_by_safetensors(tmp_path: Path) -> None:
    tensors = every_dtype()
    write(tmp_path, tensors)
    assert differing(load_file(tmp_path / SINGLE_FILE), tensors) == []


def test_every_tensor_is_aligned_to_its_element_size(tmp_path: Path) -> None:
    layout = write(tmp_path, every_dtype())
    misaligned = [tensor.name for tensor in layout.tensors.values() if tensor.offset % tensor.dtype.itemsize]
    assert misaligned == []


def test_a_tensor_that_is_not_contiguous_is_written_as_it_reads(tmp_path: Path) -> None:
    tensors = {"transposed": torch.arange(6.0).view(2, 3).T, "strided": torch.arange(10)[::3]}
    write(tmp_path, tensors)
    written = load_file(tmp_path / SINGLE_FILE)
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_a_result_of_one_shard_has_the_single_name_and_no_index(tmp_path: Path) -> None:
    write(tmp_path, many())
    assert [file.name for file in tmp_path.iterdir()] == [SINGLE_FILE]


def test_a_result_of_several_shards_has_numbered_names_and_an_index(tmp_path: Path) -> None:
    tensors = many()
    write(tmp_path, tensors, max_shard_size="4KB")
    shards = [f"model-{number:05}-of-00004.safetensors" for number in range(1, 5)]
    assert sorted(file.name for file in tmp_path.iterdir()) == [*shards, INDEX_FILE]
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"] == {name: shard for shard in shards for name in load_file(tmp_path / shard)}
    assert differing(read_tensors(tmp_path), tensors) == []


def test_the_header_marks_the_tensors_as_pytorch(tmp_path: Path) -> None:
    write(tmp_path, many(1))
    content = (tmp_path / SINGLE_FILE).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}


def test_the_planned_size_is_the_written_size(tmp_path: Path) -> None:
    layout = write(tmp_path, many() | every_dtype(), max_shard_size="4KB")
    assert layout.file_bytes == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))


def test_the_planned_positions_are_those_of_the_headers(tmp_path: Path) -> None:
    layout = write(tmp_path, many() | every_dtype(), max_shard_size="4KB")
    assert LocalSource(tmp_path).tensors == layout.tensors


# How tensors are spread over shards


def test_no_shard_is_larger_than_requested() -> None:
    layout = plan(many(), max_shard_size="1.5KB")
    sizes = [sum(tensor.nbytes for tensor in shard) for shard in layout.files.values()]
    assert max(sizes) == 1200
    assert sum(sizes) == 40 * 400


def test_a_tensor_larger_than_a_shard_gets_a_shard_of_its_own() -> None:
    layout = plan(many(3) | {"large": torch.zeros(1000)} | {"last": torch.zeros(5)}, max_shard_size="1KB")
    shards = [[tensor.name for tensor in shard] for shard in layout.files.values()]
    assert ["large"] in shards
    assert sorted(name for shard in shards for name in shard) == sorted([*many(3), "large", "last"])


def test_tensors_fill_the_shards_in_their_order() -> None:
    shards = [[tensor.name for tensor in shard] for shard in plan(many(6), max_shard_size="0.8KB").files.values()]
    assert shards == [[f"layers.{n}.weight", f"layers.{n + 1}.weight"] for n in (0, 2, 4)]


# From any thread, in any order


def test_many_threads_in_random_order_write_the_same_bytes(tmp_path: Path) -> None:
    tensors = many(200) | every_dtype()
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    write(tmp_path / "one", tensors, max_shard_size="8KB")
    writer = ShardWriter(tmp_path / "many", plan(tensors, max_shard_size="8KB"))
    names = list(tensors)
    random.Random(0).shuffle(names)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: writer.write(name, tensors[name]), names))
    writer.finish()
    one, several = ({file.name: file.read_bytes() for file in (tmp_path / n).iterdir()} for n in ("one", "many"))
    assert one == several
    assert writer.bytes_written == sum(tensor.nbytes for tensor in tensors.values())


class Taking:
    """Takes finished shards."""

    def __init__(self) -> None:
        self.taken: list[str] = []

    def wait_for_space(self) -> None:
        pass

    def take(self, shard: Path) -> None:
        assert shard.is_file()
        self.taken.append(shard.name)


def test_a_shard_is_handed_on_with_its_last_tensor(tmp_path: Path) -> None:
    tensors, recipient = many(4), Taking()
    writer = ShardWriter(tmp_path, plan(tensors, max_shard_size="0.8KB"), recipient)
    first = "model-00001-of-00002.safetensors"
    # The second tensor of the first shard comes first, then one of the other shard.
    for number in (1, 2):
        writer.write(f"layers.{number}.weight", tensors[f"layers.{number}.weight"])
        assert recipient.taken == []
    writer.write("layers.0.weight", tensors["layers.0.weight"])
    assert recipient.taken == [first]


def test_there_is_no_index_before_the_last_tensor(tmp_path: Path) -> None:
    tensors = many(4)
    writer = ShardWriter(tmp_path, plan(tensors, max_shard_size="0.8KB"))
    for name, tensor in tensors.items():
        assert not (tmp_path / INDEX_FILE).exists()
        writer.write(name, tensor)
    writer.finish()
    assert (tmp_path / INDEX_FILE).exists()


# Going on after an interruption


def interrupted(folder: Path, tensors: dict[str, Tensor], count: int) -> dict[str, str]:
    """Writes some tensors, and returns their digests."""
    writer = ShardWriter(folder, plan(tensors, max_shard_size="0.8KB"), keeps_digests=True)
    for name in list(tensors)[:count]:
        writer.write(name, tensors[name])
    digests = writer.sync()
    writer.close()
    return digests


def test_digests_are_those_of_the_bytes_written_since_the_last_call(tmp_path: Path) -> None:
    tensors = many(3) | every_dtype()
    writer = ShardWriter(tmp_path, plan(tensors), keeps_digests=True)
    first, *others = tensors
    writer.write(first, tensors[first])
    assert writer.sync() == {first: hashlib.sha256(bytes(bytes_of(tensors[first]))).hexdigest()}
    for name in others:
        writer.write(name, tensors[name])
    expected = {name: hashlib.sha256(bytes(bytes_of(tensors[name].contiguous()))).hexdigest() for name in others}
    assert writer.sync() == expected
    assert writer.sync() == {}


def test_a_writer_that_is_not_asked_for_digests_keeps_none(tmp_path: Path) -> None:
    tensors = many(1)
    writer = ShardWriter(tmp_path, plan(tensors))
    writer.write("layers.0.weight", tensors["layers.0.weight"])
    assert writer.sync() == {}


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_a_writer_that_goes_on_ends_with_the_same_bytes(tmp_path: Path, count: int) -> None:
    tensors, recipient = many(4), Taking()
    (tmp_path / "whole").mkdir()
    (tmp_path / "resumed").mkdir()
    write(tmp_path / "whole", tensors, max_shard_size="0.8KB")
    digests = interrupted(tmp_path / "resumed", tensors, count)
    assert len(digests) == count
    writer = ShardWriter(tmp_path / "resumed", plan(tensors, max_shard_size="0.8KB"), recipient)
    writer.restore(digests)
    assert len(recipient.taken) == count // 2
    for number, (name, tensor) in enumerate(tensors.items()):
        # What was restored is not looked at.
        writer.write(name, torch.zeros(3) if number < count else tensor)
    writer.finish()
    whole, resumed = ({file.name: file.read_bytes() for file in (tmp_path / n).iterdir()} for n in ("whole", "resumed"))
    assert whole == resumed
    assert len(recipient.taken) == 2
    assert writer.bytes_written == sum(tensor.nbytes for tensor in tensors.values())


def test_shards_that_have_left_the_folder_are_neither_read_nor_written_again(tmp_path: Path) -> None:
    tensors, recipient = many(4), Taking()
    digests = interrupted(tmp_path, tensors, 2)
    sent = "model-00001-of-00002.safetensors"
    (tmp_path / sent).unlink()
    writer = ShardWriter(tmp_path, plan(tensors, max_shard_size="0.8KB"), recipient)
    writer.restore(digests, sent=[sent])
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()
    assert recipient.taken == ["model-00002-of-00002.safetensors"]
    assert not (tmp_path / sent).exists()


@pytest.mark.parametrize("change", ["other bytes", "shorter", "gone"])
def test_a_restored_tensor_that_was_changed_is_refused(tmp_path: Path, change: str) -> None:
    tensors = many(4)
    digests = interrupted(tmp_path, tensors, 3)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    if change == "gone":
        shard.unlink()
    else:
        shard.write_bytes(content if change == "other bytes" else content[:-1])
    writer = ShardWriter(tmp_path, plan(tensors, max_shard_size="0.8KB"))
    with pytest.raises(
        OutputError, match=r"00001-of-00002.safetensors was changed .*: tensor 'layers\.\d\.weight' is not"
    ):
        writer.restore(digests)


# What must not happen


def test_nothing_is_finished_while_a_tensor_is_missing(tmp_path: Path) -> None:
    tensors = many(4)
    writer = ShardWriter(tmp_path, plan(tensors, max_shard_size="0.8KB"))
    for name in list(tensors)[:3]:
        writer.write(name, tensors[name])
    with pytest.raises(AssertionError, match=r"1 planned tensors were not written, the first is layers\.3\.weight"):
        writer.finish()
    assert not (tmp_path / INDEX_FILE).exists()


@pytest.mark.parametrize("wrong", [torch.zeros(10, 11), torch.zeros(100), torch.zeros(10, 10, dtype=torch.float16)])
def test_a_tensor_that_differs_from_the_plan_is_not_written(tmp_path: Path, wrong: Tensor) -> None:
    writer = ShardWriter(tmp_path, plan(many(1)))
    with pytest.raises(AssertionError, match=r"layers\.0\.weight"):
        writer.write("layers.0.weight", wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_is_written_once(tmp_path: Path) -> None:
    tensors = many(1)
    writer = ShardWriter(tmp_path, plan(tensors))
    writer.write("layers.0.weight", tensors["layers.0.weight"])
    with pytest.raises(AssertionError):
        writer.write("layers.0.weight", torch.ones(10, 10))
    assert [file.name for file in tmp_path.iterdir()] == [SINGLE_FILE]
    assert differing(load_file(tmp_path / SINGLE_FILE), tensors) == []


@pytest.mark.parametrize("written", [0, 1, 4])
def test_a_writer_that_is_closed_has_no_file_open(tmp_path: Path, written: int) -> None:
    tensors, before = many(4), len(os.listdir("/proc/self/fd"))
    writer = ShardWriter(tmp_path, plan(tensors, max_shard_size="0.8KB"))
    for name in list(tensors)[:written]:
        writer.write(name, tensors[name])
    writer.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_json_is_complete_when_it_has_its_name(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"name": "größer", "experts": 4})
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text("utf-8") == '{\n  "name": "größer",\n  "experts": 4\n}\n'
