"""The output folder: complete with its last file, and never in a state that looks complete before."""

import errno
import os
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import INDEX, build, change_config, change_tensors, contents, options, read_tensors
from torch import Tensor

import hcsmoe_hub.layer.reducer
import hcsmoe_hub.result.folder
from hcsmoe_hub import convert, execute
from hcsmoe_hub import plan as plan_conversion
from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.checkpoint.tensors import StoredTensor
from hcsmoe_hub.checkpoint.unfinished import UNFINISHED, staging
from hcsmoe_hub.errors import OutputError, VerificationError

FAILURES = [RuntimeError("broken"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Mixtral with a tokenizer file."""
    folder = build(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def names(folder: Path) -> set[str]:
    """Names of all files and folders below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# Files next to the weights

SIDECARS = {
    "generation_config.json": b'{"temperature": 0.5,\n\n "eos_token_id": [1, 2]}',
    "tokenizer.json": b'{"version":"1.0"}\r\n',
    "tokenizer_config.json": "{'é'}".encode("latin-1"),
    "tokenizer.model": bytes(range(256)),
    "special_tokens_map.json": b"{}",
    "vocab.json": b"{}",
    "merges.txt": b"a b\n",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "LICENSE": b"Apache",
    "LICENSE.md": b"Apache",
    "MODEL_LICENSE": b"Apache",
    "license.txt": b"Apache",
    "NOTICE": b"",
    "modeling_custom.py": b"import os",
}
OTHERS = {
    "README.md": b"# The source",
    "convert.py": b"import os",
    ".gitattributes": b"*",
    "images/model.png": b"PNG",
    "onnx/preprocessor_config.json": b"{}",
    "tokenizer_old/tokenizer.json": b"{}",
    "pytorch_model.bin": b"PK",
    "optimizer.pt": b"PK",
}


def test_small_files_are_copied_byte_for_byte_and_others_are_not(source: Path, tmp_path: Path) -> None:
    for name, content in (SIDECARS | OTHERS).items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(content)
    convert(source, options(source, 4))
    files = contents(tmp_path / "result")
    written = {name: files.pop(name) for name in ("config.json", "hcsmoe.json", "model.safetensors", "README.md")}
    assert all(written.values())
    assert files == SIDECARS


# Overwriting


def test_an_old_checkpoint_with_more_shards_leaves_no_stray_one(source: Path, tmp_path: Path) -> None:
    result = tmp_path / "result"
    convert(source, options(source, 6, max_shard_size="20KB"))
    assert len(list(result.glob("*.safetensors"))) > 3
    (result / "notes.txt").write_text("mine")
    convert(source, options(source, 4, overwrite=True))
    assert [file.name for file in result.glob("*.safetensors")] == ["model.safetensors"]
    assert not (result / INDEX).exists()
    assert (result / "notes.txt").read_text() == "mine"


def test_an_old_checkpoint_of_one_file_does_not_hide_the_new_shards(source: Path, tmp_path: Path) -> None:
    result = tmp_path / "result"
    convert(source, options(source, 6))
    convert(source, options(source, 4, max_shard_size="20KB", overwrite=True))
    assert not (result / "model.safetensors").exists()
    assert LocalSource(result).tensors.keys() == read_tensors(result).keys()
    assert not any(".experts.4." in name for name in read_tensors(result))


def test_small_files_of_an_old_checkpoint_are_not_mistaken_for_those_of_the_new_one(
    source: Path, tmp_path: Path
) -> None:
    old = ["chat_template.jinja", "tokenizer.model", "additional_chat_templates/tools.jinja"]
    for name in old:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("old")
    convert(source, options(source, 4))
    for name in old:
        (source / name).unlink()
    convert(source, options(source, 4, overwrite=True))
    assert [name for name in old if (tmp_path / "result" / name).exists()] == []
    assert (tmp_path / "result" / "tokenizer.json").exists()


def test_files_of_the_user_in_sub_folders_survive_overwriting(source: Path, tmp_path: Path) -> None:
    # Their names would match the patterns of small files if * matched a slash.
    mine = ["tokenizer_backup/notes.json", "words/mine.tiktoken", "onnx/preprocessor_config.json", "LICENSES/mine"]
    convert(source, options(source, 6))
    for name in mine:
        (tmp_path / "result" / name).parent.mkdir()
        (tmp_path / "result" / name).write_text("mine")
    convert(source, options(source, 4, overwrite=True))
    assert [name for name in mine if not (tmp_path / "result" / name).exists()] == []


def test_unfinished_files_of_an_earlier_run_are_removed(source: Path, tmp_path: Path) -> None:
    result = tmp_path / "result"
    result.mkdir()
    (result / "model-00001-of-00009.safetensors.incomplete").write_text("half")
    convert(source, options(source, 4, overwrite=True))
    assert not list(result.glob("*.incomplete"))


def test_an_overwritten_result_is_that_of_an_empty_folder(source: Path, tmp_path: Path) -> None:
    fresh, used = tmp_path / "fresh", tmp_path / "used"
    convert(source, options(source, 6, output=used, max_shard_size="20KB"))
    convert(source, options(source, 4, output=used, max_shard_size="40KB", overwrite=True))
    convert(source, options(source, 4, output=fresh, max_shard_size="40KB"))
    first, second = contents(fresh), contents(used)
    # The report contains times, and the card the folder.
    for name in ("hcsmoe.json", "README.md"):
        assert first.pop(name)
        assert second.pop(name)
    assert first == second


# The order of the last files


@pytest.mark.parametrize(("size", "last"), [("20KB", [INDEX, "config.json"]), ("5GB", ["config.json"])])
def test_all_files_come_at_the_end_and_index_and_config_last(
    source: Path, tmp_path: Path, size: str, last: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    named: list[str] = []
    replace = os.replace

    def recording(old: Path, new: Path) -> None:
        if Path(new).parent == tmp_path / "result":
            assert not {"config.json", INDEX} & names(tmp_path / "result") - {*last[:-1]}
            named.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(os, "replace", recording)
    convert(source, options(source, 4, max_shard_size=size))
    assert named[-len(last) :] == last
    assert sorted(named) == sorted(names(tmp_path / "result"))
    assert {"README.md", "hcsmoe.json", "tokenizer.json"} < set(named)


# Failures


def break_merging(monkeypatch: pytest.MonkeyPatch, failure: BaseException, *, after: int) -> None:
    """Makes the merge fail after some layers."""
    merged: list[int] = []
    merge_experts = hcsmoe_hub.layer.reducer.merge_experts

    def failing(*args: Any, **kwargs: Any) -> Any:
        merged.append(1)
        if len(merged) > after:
            raise failure
        return merge_experts(*args, **kwargs)

    monkeypatch.setattr(hcsmoe_hub.layer.reducer, "merge_experts", failing)


def break_reading(monkeypatch: pytest.MonkeyPatch, failure: BaseException, *, after: int) -> None:
    """Makes the background thread fail while it reads the second layer."""
    read = TensorReader.read

    def failing(reader: TensorReader, tensor: StoredTensor, into: Tensor | None = None) -> Tensor:
        if "layers.1." in tensor.name:
            raise failure
        return read(reader, tensor, into)

    monkeypatch.setattr(TensorReader, "read", failing)


def break_writing(monkeypatch: pytest.MonkeyPatch, failure: BaseException, *, after: int) -> None:
    """Makes one of the last files fail."""
    written: list[int] = []
    write_json = hcsmoe_hub.result.folder.write_json

    def failing(*args: Any) -> None:
        written.append(1)
        if len(written) > after:
            raise failure
        write_json(*args)

    monkeypatch.setattr(hcsmoe_hub.result.folder, "write_json", failing)


Break = Callable[..., None]
# The first and the last moment of each.
MOMENTS = [(break_merging, 0), (break_merging, 1), (break_reading, 0), (break_writing, 0), (break_writing, 1)]
MOMENT_NAMES = ["first_layer", "last_layer", "background", "report", "config"]


# Every moment with some failure, and every failure at some moment.
@pytest.mark.parametrize(
    ("break_it", "after", "failure"),
    [(*moment, failure) for moment, failure in zip(MOMENTS, cycle(FAILURES), strict=False)],
    ids=MOMENT_NAMES,
)
def test_a_failure_leaves_no_new_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, break_it: Break, after: int
) -> None:
    output = tmp_path / "new" / "deep" / "result"
    wanted = options(source, 4, output=output, max_shard_size="20KB", checkpoint=False)
    before = names(tmp_path)
    break_it(monkeypatch, failure, after=after)
    with pytest.raises(type(failure)) as caught:
        convert(source, wanted)
    assert caught.value is failure
    assert names(tmp_path) == before


def test_a_failure_leaves_no_folder_of_a_copied_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    break_writing(monkeypatch, KeyboardInterrupt(), after=0)
    with pytest.raises(KeyboardInterrupt):
        convert(source, options(source, 4, checkpoint=False))
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize(("break_it", "after"), MOMENTS, ids=MOMENT_NAMES)
def test_a_failure_leaves_an_empty_folder_of_the_user_empty(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_it: Break, after: int
) -> None:
    (tmp_path / "result").mkdir()
    break_it(monkeypatch, KeyboardInterrupt(), after=after)
    with pytest.raises(KeyboardInterrupt):
        convert(source, options(source, 4, checkpoint=False))
    assert names(tmp_path / "result") == set()


@pytest.mark.parametrize(("break_it", "after"), MOMENTS, ids=MOMENT_NAMES)
def test_a_failure_while_overwriting_leaves_the_old_result_as_it_was(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_it: Break, after: int
) -> None:
    result = tmp_path / "result"
    convert(source, options(source, 6, max_shard_size="20KB"))
    (result / "notes.txt").write_text("mine")
    before = contents(result)
    break_it(monkeypatch, KeyboardInterrupt(), after=after)
    with pytest.raises(KeyboardInterrupt):
        convert(source, options(source, 4, overwrite=True))
    left = contents(result)
    assert {name: content for name, content in left.items() if not name.startswith(UNFINISHED)} == before


def test_after_a_failure_the_same_conversion_gives_the_same_result(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tmp_path / "expected"
    convert(source, options(source, 4, output=expected))
    with monkeypatch.context() as broken:
        break_merging(broken, KeyboardInterrupt(), after=1)
        with pytest.raises(KeyboardInterrupt):
            convert(source, options(source, 4))
    convert(source, options(source, 4))
    assert (tmp_path / "result" / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("experts.3.w1", float("nan")),
        ("experts.3.w2", float("inf")),
        ("gate", float("nan")),
        ("gate", float("inf")),
    ],
)
def test_broken_weights_end_the_conversion_with_their_layer_and_leave_nothing(
    source: Path, tmp_path: Path, part: str, value: float
) -> None:
    name = f"model.layers.1.block_sparse_moe.{part}.weight"
    change_tensors(source, lambda tensors: tensors.update({name: torch.full_like(tensors[name], value)}))
    with pytest.raises(
        VerificationError, match=rf"layers?[. ]1\b.* not finite: the source's tensor '{name}' holds NaN or infinite"
    ):
        # The first layer is complete by then, but the next run would end here as well.
        convert(source, options(source, 8))
    assert not (tmp_path / "result").exists()


def test_a_failure_removes_code_that_only_the_config_names(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_config(source, auto_map={"AutoModelForCausalLM": "my_model.Model"})
    (source / "my_model.py").touch()
    copy = hcsmoe_hub.result.folder.copy_sidecars

    def fail(*arguments: Any) -> None:
        copy(*arguments)
        assert (staging(tmp_path / "result") / "my_model.py").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(hcsmoe_hub.result.folder, "copy_sidecars", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(source, options(source, 4, checkpoint=False))
    assert not (tmp_path / "result").exists()


def test_a_folder_that_cannot_be_made_is_refused_with_the_reason(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, **_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    plan = plan_conversion(source, options(source, 4))
    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(OutputError, match=r"nothing can be written to .*result: Read-only file system\."):
        execute(plan)


def test_a_result_that_fails_its_own_check_does_not_stay(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, **_: Any) -> None:
        assert (folder / "config.json").exists()
        raise VerificationError("it is damaged.", hint="convert again")

    monkeypatch.setattr("hcsmoe_hub.result.verify.check_structure", fail)
    with pytest.raises(VerificationError):
        convert(source, options(source, 4))
    assert not (tmp_path / "result").exists()
