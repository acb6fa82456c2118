"""Every file of a source, and whatever its tensors are called, has a place in the plan and in the report."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import INDEX, build, contents, options, read_tensors, refuse, write_tensors

from hcsmoe_hub import convert
from hcsmoe_hub import plan as plan_conversion
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.report.read import read_report
from hcsmoe_hub.result.verify import check_structure


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Mixtral in several shards."""
    return build(tmp_path / "model")


def rename(folder: Path, change: Callable[[str], str]) -> None:
    """Renames every tensor."""
    write_tensors(folder, {change(name): tensor for name, tensor in read_tensors(folder).items()})


def test_a_report_names_every_file_that_stays_behind(source: Path) -> None:
    (source / "original").mkdir()
    for name in ("pytorch_model.bin", "consolidated.safetensors", "original/params.json", "License.txt", "README.md"):
        (source / name).write_bytes(b"---\n---\n")
    report = convert(source, options(source, 4))
    assert report.left_files.keys() == {"README.md", "consolidated.safetensors", "original/", "pytorch_model.bin"}
    written = (source.parent / "result" / "hcsmoe.json").read_text()
    assert read_report(written, label="it").left_files == report.left_files
    assert (source.parent / "result" / "License.txt").exists()


def test_a_report_of_an_earlier_version_names_no_file(source: Path) -> None:
    convert(source, options(source, 4))
    content = json.loads((source.parent / "result" / "hcsmoe.json").read_text())
    del content["left_files"]
    assert read_report(json.dumps(content), label="it").left_files == {}


def test_every_file_is_read_copied_or_named(source: Path) -> None:
    for name in ("tokenizer.json", "tekken.json", "modeling_a.py", "b.py", "optimizer.pt", "x.gguf", "notes"):
        (source / name).write_text("")
    (source / "modeling_a.py").write_text("from .b import B")
    plan = plan_conversion(source, options(source, 4))
    weights = {"config.json", INDEX, *plan.model.source.shards}
    assert {*weights, *plan.sidecars, *plan.left_files} == contents(source).keys()
    assert plan.left_files.keys() == {"optimizer.pt", "x.gguf", "notes"}


def test_shards_that_a_single_file_replaces_are_named(source: Path) -> None:
    shards = {file.name for file in source.glob("*.safetensors")}
    save_file(read_tensors(source), source / "model.safetensors")
    plan = plan_conversion(source, options(source, 4))
    assert plan.left_files == dict.fromkeys([*shards, INDEX], "weights that the checkpoint does not load")


def test_an_adapter_next_to_the_weights_is_a_warning(source: Path) -> None:
    (source / "adapter_config.json").write_text("{}")
    (source / "adapter_model.safetensors").write_bytes(b"")
    plan = plan_conversion(source, options(source, 4))
    assert plan.warnings == ["the source has an adapter (adapter_config.json); the weights are converted without it."]
    assert plan.left_files.keys() == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_pointer_in_place_of_a_small_file_is_refused_with_the_plan(source: Path) -> None:
    (source / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert "tokenizer.model is a Git LFS pointer" in refuse(source, SourceError, options(source, 4)).message


def test_shards_without_an_index_are_converted_like_those_with_one(source: Path, tmp_path: Path) -> None:
    convert(source, options(source, 4, output=tmp_path / "expected"))
    (source / INDEX).unlink()
    convert(source, options(source, 4))
    expected, found = (tmp_path / name / "model.safetensors" for name in ("expected", "result"))
    assert found.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module._orig_mod.", "base_model.model."])
def test_a_wrapped_checkpoint_is_converted_like_the_plain_one(source: Path, tmp_path: Path, wrapper: str) -> None:
    convert(source, options(source, 4, output=tmp_path / "expected"))
    rename(source, lambda name: wrapper + name)
    report = convert(source, options(source, 4))
    assert len(report.warnings) == 1
    assert f"the tensor names contain {wrapper!r}" in report.warnings[0]
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "result"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    check_structure(tmp_path / "result")


def test_compiled_layers_are_converted_under_their_plain_names(source: Path, tmp_path: Path) -> None:
    names = read_tensors(source).keys()
    rename(source, lambda name: name.replace("layers.0.", "layers.0._orig_mod."))
    convert(source, options(source, 4))
    assert read_tensors(tmp_path / "result").keys() <= names
