"""``hcsmoe verify``: a sound checkpoint, and damaged ones."""

import shutil

import pytest


@pytest.fixture
def copy(converted, tmp_path):
    """A copy of a converted checkpoint, to be damaged."""
    folder, _ = converted
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def overwrite_end(folder, content):
    """Writes ``content`` over the last bytes of the weights."""
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-len(content), 2)
        file.write(content)


def test_sound_checkpoint_is_described_to_a_person(run, converted, example):
    folder, _ = converted
    result = run("verify", folder, "--against", example)
    assert (result.code, result.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == f"✓ {folder} is sound"
    assert [line.split()[0] for line in lines[1:]] == ["structure", "values", "reload", "generation", "source"]
    assert "4 MoE layers x 4 experts" in lines[1]
    assert "78 tensors, 3.8 MB" in lines[2]
    assert f"bit-identical to {example}" in lines[5]


def test_sound_checkpoint_is_one_json_document(run, converted):
    folder, _ = converted
    result = run("verify", folder, "--json")
    assert (result.code, result.stderr) == (0, "")
    document = result.document()
    assert document["ok"] is True
    assert (document["tensors"], document["experts"], document["moe_layers"]) == (78, 4, 4)
    assert len(document["generated"]) == 8
    assert document["against"] is document["identical"] is None


def test_number_that_is_not_finite_fails(run, copy):
    overwrite_end(copy, b"\xff\x7f" * 32)
    result = run("verify", copy, "--json")
    assert (result.code, result.stdout) == (1, "")
    assert "is not finite" in result.stderr


def test_truncated_shard_fails(run, copy):
    shard = copy / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    result = run("verify", copy)
    assert (result.code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: model.safetensors")


def test_tensor_that_differs_from_the_source_fails(run, copy, example):
    # The last tensor is an attention matrix, which no merge touches.
    overwrite_end(copy, bytes(64))
    result = run("verify", copy, "--against", example)
    assert result.code == 1
    assert f"differs from {example}" in result.stderr


def test_missing_folder_is_a_known_failure(run, tmp_path):
    result = run("verify", tmp_path / "nothing")
    assert result.code == 1
    assert result.stderr.startswith(f"Error: there is no folder {tmp_path / 'nothing'}.\nHint: ")
