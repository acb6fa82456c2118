"""Links in the folder of a checkpoint: which are followed, and which could lead to files of others."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.checkpoint.tensors import INDEX_FILE
from hcsmoe_hub.errors import SourceError

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards without an index."""
    made = tmp_path / "model"
    made.mkdir()
    for shard, name in zip(SHARDS, "ab", strict=True):
        save_file({name: torch.arange(4)}, made / shard)
    return made


@pytest.mark.parametrize(
    "file", ["config.json", INDEX_FILE, "LICENSE", "tokenizer_config.json", "tokenizer.safetensors", "README.md"]
)
@pytest.mark.parametrize("is_relative", [False, True])
def test_a_link_to_a_file_outside_of_the_folder_is_refused(folder: Path, file: str, is_relative: bool) -> None:
    outside = folder.parent / "id_rsa"
    outside.write_text("secret")
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to("../id_rsa" if is_relative else outside)
    with pytest.raises(SourceError) as caught:
        LocalSource(folder).fetch(file)
    target = outside.resolve()
    assert caught.value.message == (
        f"{folder / file} is a link to {target}, outside of the checkpoint, from where only shards are read."
    )
    assert "put a copy of it in place of the link" in caught.value.hint


def test_links_within_the_folder_and_links_to_the_folder_are_followed(folder: Path) -> None:
    (folder / "LICENSE").write_text("free")
    (folder / "NOTICE").symlink_to("LICENSE")
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert LocalSource(link).text("NOTICE") == "free"


def test_shards_may_lie_on_another_disk(folder: Path) -> None:
    elsewhere = folder.parent / "weights"
    elsewhere.mkdir()
    for shard in SHARDS:
        (folder / shard).rename(elsewhere / shard)
        (folder / shard).symlink_to(elsewhere / shard)
    assert sorted(LocalSource(folder).tensors) == ["a", "b"]


@pytest.mark.parametrize("below", ["", "sub"])
def test_a_snapshot_of_the_cache_of_the_hub_may_link_to_the_files_of_its_repository_only(
    tmp_path: Path, below: str
) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123" / below
    snapshot.mkdir(parents=True)
    for place, name in ((repository, "blobs"), (tmp_path / "models--org--other", "blobs"), (repository, "refs")):
        (place / name).mkdir(parents=True)
        (place / name / "ab").write_text("{}")
    up = "../" * len(snapshot.relative_to(repository).parts)
    (snapshot / "config.json").symlink_to(f"{up}blobs/ab")
    (snapshot / "LICENSE").symlink_to(f"{up}../models--org--other/blobs/ab")
    (snapshot / "NOTICE").symlink_to(f"{up}refs/ab")
    source = LocalSource(snapshot)
    assert source.config == {}
    for file in ("LICENSE", "NOTICE"):
        with pytest.raises(SourceError, match="is a link to"):
            source.fetch(file)
