"""A checkpoint in a local folder: what is read from it, and how every kind of damage is refused."""

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.checkpoint.tensors import DTYPES, FIRST_READ_BYTES, INDEX_FILE, PAIRS, SINGLE_FILE
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.hub.open import open_source

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_checkpoint(folder: Path, shards: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes shards, the index that names them, and a config."""
    folder.mkdir(exist_ok=True)
    for shard, tensors in shards.items():
        save_file(dict(tensors), folder / shard)
    write_index(folder, {name: shard for shard, tensors in shards.items() for name in tensors})
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral"}))


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def write_header(path: Path, header: object, *, data_bytes: int) -> None:
    """Writes a safetensors file with this header."""
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data_bytes))


def refusal(folder: Path) -> SourceError:
    """The error of opening a damaged checkpoint."""
    with pytest.raises(SourceError) as caught:
        _ = LocalSource(folder).tensors
    return caught.value


def header_refusal(folder: Path, header: object, *, data_bytes: int) -> SourceError:
    """The error of a checkpoint whose only file has this header."""
    folder.mkdir()
    write_header(folder / SINGLE_FILE, header, data_bytes=data_bytes)
    return refusal(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint of two shards, for a test to damage."""
    first = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4, dtype=torch.bfloat16)}
    write_checkpoint(tmp_path / "model", {FIRST: first, SECOND: {"c": torch.arange(5)}})
    return tmp_path / "model"


# What is read


def test_a_folder_is_described_by_its_config_and_headers(folder: Path) -> None:
    source = open_source(str(folder))
    assert source.config == {"model_type": "mixtral"}
    assert source.shards == [FIRST, SECOND]
    assert {name: (tensor.shard, tensor.dtype, tensor.shape) for name, tensor in source.tensors.items()} == {
        "a": (FIRST, torch.float32, (2, 3)),
        "b": (FIRST, torch.bfloat16, (4,)),
        "c": (SECOND, torch.int64, (5,)),
    }


def test_a_folder_has_a_name_but_no_revision_and_nothing_to_download(folder: Path) -> None:
    source = open_source(str(folder))
    assert (source.name, source.label) == ("model", str(folder))
    assert (source.path, source.repo_id, source.revision) == (folder, None, None)
    assert (source.cache, source.gated, source.renamed_from) == (None, None, None)
    assert source.pieces([list(source.tensors.values())], low_disk=True) == [[]]


def test_files_in_sub_folders_are_listed_with_their_folder(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").touch()
    assert LocalSource(folder).files() == [
        "additional_chat_templates/tools.jinja",
        "config.json",
        FIRST,
        SECOND,
        INDEX_FILE,
    ]


def test_a_single_file_wins_over_an_index_as_in_transformers(folder: Path) -> None:
    save_file({"only": torch.zeros(3)}, folder / SINGLE_FILE)
    assert list(LocalSource(folder).tensors) == ["only"]


def test_a_header_longer_than_the_first_read_is_read_whole(tmp_path: Path) -> None:
    tensors = {f"{'long' * 10}.{number}": torch.tensor([number]) for number in range(1500)}
    write_checkpoint(tmp_path, {FIRST: tensors})
    source = LocalSource(tmp_path)
    header_bytes = min(tensor.offset for tensor in source.tensors.values())
    assert header_bytes > FIRST_READ_BYTES
    with TensorReader(source) as reader:
        assert all(torch.equal(reader.read(source.tensors[name]), tensor) for name, tensor in tensors.items())


# What the reader returns


def all_dtypes() -> dict[str, Tensor]:
    """A matrix, a scalar and two tensors without elements of every dtype; every matrix has different bytes."""
    tensors = {}
    for number, (name, dtype) in enumerate(DTYPES.items()):
        content = torch.arange(number, number + 6 * dtype.itemsize, dtype=torch.uint8)
        if dtype is torch.bool:
            content %= 2
        tensors[f"{name}.matrix"] = content.view(dtype).view(2, 3)
        if dtype in PAIRS:
            # safetensors has no scalar of half a byte, and reads an empty tensor of these with another shape.
            continue
        tensors[f"{name}.scalar"] = content[: dtype.itemsize].clone().view(dtype).view(())
        tensors[f"{name}.empty"] = torch.empty(0, dtype=dtype)
        tensors[f"{name}.no_rows"] = torch.empty((0, 4), dtype=dtype)
    return tensors


def raw_bytes(tensor: Tensor) -> bytes:
    """Bytes of a tensor: NaNs equal themselves, and every dtype can be compared."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def same(found: Tensor, expected: Tensor) -> bool:
    return (found.dtype, found.shape, raw_bytes(found)) == (expected.dtype, expected.shape, raw_bytes(expected))


def test_the_reader_returns_what_safetensors_returns_for_every_dtype(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {FIRST: all_dtypes(), SECOND: {"last": torch.arange(9.0)}})
    expected = load_file(tmp_path / FIRST) | load_file(tmp_path / SECOND)
    source = LocalSource(tmp_path)
    assert source.tensors.keys() == expected.keys()
    with TensorReader(source) as reader:
        wrong = [name for name, tensor in source.tensors.items() if not same(reader.read(tensor), expected[name])]
    assert wrong == []


def test_the_reader_counts_every_byte_it_reads(folder: Path) -> None:
    source = LocalSource(folder)
    with TensorReader(source) as reader:
        reader.read(source.tensors["a"])
        assert reader.bytes_read == 24
        reader.read(source.tensors["c"])
        reader.read(source.tensors["c"])
        assert reader.bytes_read == 24 + 40 + 40


def test_the_reader_serves_several_threads_at_once(tmp_path: Path) -> None:
    shards = {
        shard: {f"{shard}.{number}": torch.full((500, 100), float(number)) for number in range(20)}
        for shard in (FIRST, SECOND)
    }
    write_checkpoint(tmp_path, shards)
    source = LocalSource(tmp_path)
    names = list(source.tensors) * 3
    with TensorReader(source) as reader, ThreadPoolExecutor(8) as threads:
        contents = list(threads.map(lambda name: reader.read(source.tensors[name]), names))
    expected = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    assert all(torch.equal(content, expected[name]) for name, content in zip(names, contents, strict=True))
    assert reader.bytes_read == sum(content.nbytes for content in contents)


def test_the_reader_refuses_a_shard_that_shrank_since_it_was_planned(folder: Path) -> None:
    source = LocalSource(folder)
    tensor = source.tensors["c"]
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-1])
    with TensorReader(source) as reader, pytest.raises(SourceError, match="has changed from 104 to 103 bytes"):
        reader.read(tensor)


# Shards


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / SECOND).unlink()
    error = refusal(folder)
    assert f"{folder} lacks 1 of 2 shards that its index lists: {SECOND}." in error.message
    assert error.hint == "download the missing shards"


def test_a_truncated_shard_is_refused_with_both_sizes(folder: Path) -> None:
    content = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(content[:-3])
    error = refusal(folder)
    assert f"{SECOND} is {len(content) - 3} bytes long, but its header describes {len(content)}" in error.message
    assert error.hint == "download this shard again"


def test_bytes_after_the_data_are_refused(folder: Path) -> None:
    content = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(content + b"\0")
    message = refusal(folder).message
    assert f"{SECOND} is {len(content) + 1} bytes long, but its header describes {len(content)}" in message


@pytest.mark.parametrize("kept", [0, 5, 8, 30])
def test_a_shard_cut_inside_its_header_is_refused(folder: Path, kept: int) -> None:
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:kept])
    assert refusal(folder).message.startswith(f"{SECOND} is not a safetensors file, or it is truncated")


@pytest.mark.parametrize("content", [b"PK\3\4" + bytes(500), b"\xff" * 64, b"<!DOCTYPE html><title>Sign in</title>"])
def test_a_file_of_another_format_is_refused(folder: Path, content: bytes) -> None:
    (folder / SECOND).write_bytes(content)
    error = refusal(folder)
    assert f"{SECOND} is not a safetensors file" in error.message
    assert str(int.from_bytes(content[:8], "little")) in error.message


def test_a_tensor_that_two_shards_store_is_refused(folder: Path) -> None:
    save_file({"b": torch.zeros(4), "c": torch.arange(5)}, folder / SECOND)
    assert f"{folder} stores 'b' twice: in {FIRST} and in {SECOND}." in refusal(folder).message


# Headers


def entry(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_tensor_whose_shape_disagrees_with_its_bytes_is_refused(tmp_path: Path) -> None:
    message = header_refusal(tmp_path / "model", {"w": entry(shape=[2, 4])}, data_bytes=24).message
    assert f"{SINGLE_FILE}: tensor 'w' of shape [2, 4] needs 32 bytes, but its header reserves 24." in message


@pytest.mark.parametrize("dtype", ["F6_E2M3", "I4", "f32", None])
def test_a_dtype_that_torch_does_not_have_is_refused_with_the_known_ones(tmp_path: Path, dtype: object) -> None:
    error = header_refusal(tmp_path / "model", {"w": entry(dtype=dtype)}, data_bytes=24)
    assert f"tensor 'w' has the dtype {dtype}, which PyTorch" in error.message
    assert "BF16" in error.hint


@pytest.mark.parametrize("shape", [[], [2, 3]])
def test_pairs_of_values_that_do_not_fill_whole_bytes_are_refused(tmp_path: Path, shape: list[int]) -> None:
    message = header_refusal(tmp_path / "model", {"w": entry("F4", shape, [0, 3])}, data_bytes=3).message
    assert f"tensor 'w' has the shape {shape} and the offsets [0, 3], which are not valid" in message


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [([-2, -3], [0, 24]), (["2", "3"], [0, 24]), ([2.0, 3], [0, 24]), (6, [0, 24]), ([2, 3], [0]), ([2, 3], None)],
)
def test_sizes_that_are_not_valid_are_refused(tmp_path: Path, shape: object, offsets: object) -> None:
    message = header_refusal(tmp_path / "model", {"w": entry(shape=shape, offsets=offsets)}, data_bytes=24).message
    assert f"tensor 'w' has the shape {shape} and the offsets {offsets}, which are not valid" in message


@pytest.mark.parametrize("header", [[], "w", {"w": 5}, {"w": {"dtype": ["F32"]}}])
def test_a_malformed_header_is_refused(tmp_path: Path, header: object) -> None:
    assert SINGLE_FILE in header_refusal(tmp_path / "model", header, data_bytes=24).message


@pytest.mark.parametrize("second", [[12, 36], [28, 52]], ids=["overlap", "gap"])
def test_tensors_that_overlap_or_leave_a_gap_are_refused(tmp_path: Path, second: list[int]) -> None:
    header = {"w": entry(), "x": entry(offsets=second)}
    message = header_refusal(tmp_path / "model", header, data_bytes=second[1]).message
    data_start = (tmp_path / "model" / SINGLE_FILE).stat().st_size - second[1]
    assert f"tensor 'x' begins at byte {data_start + second[0]}" in message
    assert f"the one before it ends at {data_start + 24}" in message


# The index and the config


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "shards/../../x.safetensors",
        "/x.safetensors",
        "C:\\x.safetensors",
        "C:x.safetensors",
        "\\\\host\\share\\x.safetensors",
        "..\\x.safetensors",
        "",
    ],
)
def test_an_index_that_names_a_file_outside_the_folder_is_refused(folder: Path, name: str) -> None:
    save_file({"c": torch.arange(5)}, folder.parent / "x.safetensors")
    write_index(folder, {"a": FIRST, "b": FIRST, "c": name})
    error = refusal(folder)
    assert f"{INDEX_FILE} lists the file {name!r}, which is outside the checkpoint's own folder" in error.message
    assert "hostile" in error.hint


def test_an_index_that_places_a_tensor_in_the_wrong_shard_is_refused(folder: Path) -> None:
    write_index(folder, {"a": FIRST, "b": SECOND, "c": SECOND})
    assert f"places tensor 'b' in {SECOND}, but it is in {FIRST}" in refusal(folder).message


def test_an_index_that_names_a_tensor_in_no_shard_is_refused(folder: Path) -> None:
    write_index(folder, {"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND})
    assert f"places tensor 'd' in {SECOND}, but it is in no shard" in refusal(folder).message


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', "null"])
def test_an_index_without_a_weight_map_is_refused(folder: Path, content: str) -> None:
    (folder / INDEX_FILE).write_text(content)
    assert f"{folder}/{INDEX_FILE} has no weight_map" in refusal(folder).message


# A file that is not JSON, one that ends too early, and one nested deeper than any parser follows.
BROKEN_JSON = ["<html>", '{"model_type": "mix', "[" * 100_000]


@pytest.mark.parametrize("content", BROKEN_JSON, ids=["html", "cut", "nested"])
def test_an_index_that_is_not_json_is_refused(folder: Path, content: str) -> None:
    (folder / INDEX_FILE).write_text(content)
    assert f"{folder}/{INDEX_FILE} is not valid JSON" in refusal(folder).message


@pytest.mark.parametrize("content", BROKEN_JSON, ids=["html", "cut", "nested"])
def test_a_config_that_is_not_json_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(SourceError, match=r"config\.json is not valid JSON"):
        _ = LocalSource(folder).config


def test_a_config_that_is_not_text_is_refused(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\x80\x02")
    with pytest.raises(SourceError, match=r"config\.json is not UTF-8 text.*0x80"):
        _ = LocalSource(folder).config


def test_a_config_that_is_not_an_object_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")
    with pytest.raises(SourceError, match=r"config\.json is not a JSON object"):
        _ = LocalSource(folder).config


def test_a_folder_without_a_config_is_not_a_checkpoint(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(SourceError) as caught:
        _ = LocalSource(folder).config
    assert f"{folder} has no config.json" in caught.value.message
    assert "config.json" in caught.value.hint


# Weights that are not safetensors


def touch(folder: Path, names: Iterable[str]) -> Path:
    for name in names:
        (folder / name).touch()
    return folder


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert f"{touch(tmp_path, ['config.json'])} holds no weights" in refusal(tmp_path).message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "consolidated.00.pth"])
def test_weights_of_another_format_are_named_and_never_opened(tmp_path: Path, name: str) -> None:
    error = refusal(touch(tmp_path, ["config.json", name]))
    assert f"holds only {name}: hcsmoe reads safetensors and never opens a pickle" in error.message
    assert error.hint.startswith("convert the weights to safetensors first")


# A clone without Git LFS

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4' * 64}\nsize 2727464\n"


@pytest.mark.parametrize("name", [FIRST, INDEX_FILE, "config.json", "tokenizer.json"])
def test_a_git_lfs_pointer_is_named_with_what_it_stands_for(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    with pytest.raises(SourceError) as caught:
        _ = LocalSource(folder).config, LocalSource(folder).tensors, LocalSource(folder).fetch(name)
    assert f"{name} is a Git LFS pointer for 2727464 bytes that are not here" in caught.value.message
    assert "git lfs pull" in caught.value.hint
    assert "hf download" in caught.value.hint


def test_a_damaged_git_lfs_pointer_is_still_one(folder: Path) -> None:
    (folder / FIRST).write_text(POINTER[:60])
    assert f"{FIRST} is a Git LFS pointer: the repository was cloned without Git LFS." in refusal(folder).message
