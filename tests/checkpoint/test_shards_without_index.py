"""A checkpoint whose index is missing, or whose weights have other names than transformers gives them."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.checkpoint.tensors import INDEX_FILE
from hcsmoe_hub.errors import SourceError


def shard(number: int, total: int, series: str = "model") -> str:
    return f"{series}-{number:05}-of-{total:05}.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    return tmp_path


def write(folder: Path, files: Mapping[str, str]) -> LocalSource:
    """Writes one tensor to each file, by its name."""
    for file, tensor in files.items():
        save_file({tensor: torch.arange(4.0)}, folder / file)
    return LocalSource(folder)


def refusal(source: LocalSource) -> SourceError:
    with pytest.raises(SourceError) as caught:
        _ = source.tensors
    return caught.value


@pytest.mark.parametrize(
    "files",
    [
        [shard(1, 3), shard(2, 3), shard(3, 3)],
        [shard(0, 3), shard(1, 3), shard(2, 3)],
        [shard(1, 1)],
        ["model-1-of-2.safetensors", "model-2-of-2.safetensors"],
        ["model.fp16.safetensors"],
        ["model-part-a.safetensors", "model-part-b.safetensors"],
        [shard(1, 2, "pytorch_model"), shard(2, 2, "pytorch_model")],
        ["weights.safetensors"],
        ["layers.safetensors", "embeddings.safetensors"],
    ],
)
def test_all_shards_are_read(folder: Path, files: list[str]) -> None:
    source = write(folder, {file: f"tensor{number}" for number, file in enumerate(files)})
    assert source.shards == sorted(files)
    assert {tensor.shard for tensor in source.tensors.values()} == set(files)
    assert source.weight_map is None


@pytest.mark.parametrize(
    "other",
    [
        "consolidated.safetensors",
        "adapter_model.safetensors",
        "._model.safetensors",
        "mm_projector.safetensors",
        "model.fp16.safetensors",
        "model-00001-of-00002 (1).safetensors",
    ],
)
def test_files_that_are_not_named_like_the_model_are_left_out(folder: Path, other: str) -> None:
    source = write(folder, {shard(1, 2): "a", shard(2, 2): "b", other: "c"})
    assert source.tensors.keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("present", "lost"),
    [([1, 3], "1 of 3"), ([2], "2 of 3"), ([3], "2 of 3"), ([0, 2], "1 of 3")],
)
def test_a_series_with_a_gap_is_refused(folder: Path, present: list[int], lost: str) -> None:
    error = refusal(write(folder, {shard(number, 3): f"tensor{number}" for number in present}))
    absent = min({0, 1, 2, 3} - set(present) - (set() if 0 in present else {0}))
    assert f"{folder} lacks {lost} shards, by the names of the others: {shard(absent, 3)}" in error.message
    assert error.hint == "download the missing shards"


def test_a_series_of_absurd_length_is_refused_at_once(folder: Path) -> None:
    message = refusal(write(folder, {shard(1, 10**15): "a"})).message
    assert f"lacks {10**15 - 1} of {10**15} shards" in message


def test_two_variants_of_the_same_weights_are_refused_with_both_names(folder: Path) -> None:
    message = refusal(write(folder, {"model.fp16.safetensors": "a", "model.fp32.safetensors": "a"})).message
    assert f"{folder} stores 'a' twice: in model.fp16.safetensors and in model.fp32.safetensors." in message


def test_weights_under_the_names_of_mistral_are_called_so(folder: Path) -> None:
    error = refusal(write(folder, {"consolidated.safetensors": "layers.0.attention.wq.weight"}))
    assert "holds only consolidated.safetensors: the tensors have Mistral's own names" in error.message
    assert "convert_mistral_weights_to_hf.py" in error.hint


@pytest.mark.parametrize("place", ["weights/model.safetensors", "MODEL.SAFETENSORS"])
def test_weights_in_another_place_are_named(folder: Path, place: str) -> None:
    (folder / place).parent.mkdir(exist_ok=True)
    error = refusal(write(folder, {place: "a"}))
    assert f"only {place}." in error.message
    assert "one folder" in error.hint


def test_an_adapter_is_not_a_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    error = refusal(write(folder, {"adapter_model.safetensors": "base_model.model.lm_head.lora_A.weight"}))
    assert f"{folder} holds an adapter, not a model." in error.message
    assert "merge_and_unload" in error.hint


# Names that a wrapper left


@pytest.mark.parametrize(
    ("wrapper", "stored"),
    [
        ("_orig_mod.", ["_orig_mod.model.norm.weight", "_orig_mod.lm_head.weight"]),
        ("module.", ["module.model.norm.weight", "module.lm_head.weight"]),
        ("module._orig_mod.", ["module._orig_mod.model.norm.weight", "module._orig_mod.lm_head.weight"]),
        ("_orig_mod.module.", ["_orig_mod.module.model.norm.weight", "_orig_mod.module.lm_head.weight"]),
        ("base_model.model.", ["base_model.model.model.norm.weight", "base_model.model.lm_head.weight"]),
        ("_orig_mod.", ["model._orig_mod.norm.weight", "lm_head.weight"]),
        ("_fsdp_wrapped_module.", ["_fsdp_wrapped_module.model._fsdp_wrapped_module.norm.weight", "lm_head.weight"]),
    ],
)
@pytest.mark.parametrize("has_index", [True, False])
def test_what_a_wrapper_left_in_the_names_is_left_out(
    folder: Path, wrapper: str, stored: list[str], has_index: bool
) -> None:
    files = {shard(number + 1, 2): name for number, name in enumerate(stored)}
    source = write(folder, files)
    if has_index:
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {name: file for file, name in files.items()}}))
    assert source.wrapper == wrapper
    assert list(source.tensors) == ["model.norm.weight", "lm_head.weight"]
    assert [tensor.name for tensor in source.tensors.values()] == list(source.tensors)
    assert [tensor.shard for tensor in source.tensors.values()] == list(files)
    assert source.weight_map == (dict(zip(source.tensors, files, strict=True)) if has_index else None)


@pytest.mark.parametrize(
    "stored",
    [
        ["model.norm.weight", "lm_head.weight"],
        ["module.norm.weight", "lm_head.weight"],
        ["_orig_mod.lm_head.weight", "lm_head.weight"],
        ["model.my_orig_mod.weight", "model.submodule.weight"],
    ],
)
def test_names_that_no_wrapper_explains_stay(folder: Path, stored: list[str]) -> None:
    source = write(folder, {shard(number + 1, 2): name for number, name in enumerate(stored)})
    assert (source.wrapper, list(source.tensors)) == ("", stored)


@pytest.mark.parametrize(
    "name", ["base_model.model.lm_head.lora_A.weight", "lm_head.lora_B.default.weight", "lm_head.base_layer.weight"]
)
def test_an_adapter_that_was_not_merged_is_refused(folder: Path, name: str) -> None:
    error = refusal(write(folder, {"model.safetensors": name}))
    assert f"stores {name!r}, a part of a PEFT adapter" in error.message
    assert "merge" in error.hint


def test_a_tensor_that_is_read_under_its_plain_name_has_its_own_bytes(folder: Path) -> None:
    from hcsmoe_hub.checkpoint.reader import TensorReader

    tensors: dict[str, Tensor] = {f"module.{name}": torch.full((3,), float(number)) for number, name in enumerate("ab")}
    save_file(tensors, folder / "model.safetensors")
    source = LocalSource(folder)
    with TensorReader(source) as reader:
        assert [reader.read(source.tensors[name])[0].item() for name in "ab"] == [0, 1]
