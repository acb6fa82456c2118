"""``hcsmoe inspect``: what a checkpoint is made of, from headers alone."""

import shutil

import pytest


@pytest.fixture
def headers_only(example, tmp_path):
    """The example model with every weight byte after the headers zeroed, so that reading weights would show."""
    folder = tmp_path / "model"
    shutil.copytree(example, folder)
    for shard in folder.glob("*.safetensors"):
        content = shard.read_bytes()
        header_end = 8 + int.from_bytes(content[:8], "little")
        shard.write_bytes(content[:header_end] + bytes(len(content) - header_end))
    return folder


def test_document_describes_the_model(run, example):
    result = run("inspect", example, "--json")
    assert (result.code, result.stderr) == (0, "")
    document = result.document()
    assert document["source"] == {
        "path": str(example),
        "revision": None,
        "model_type": "mixtral",
        "dtype": "BF16",
        "quantization": None,
    }
    assert document["architecture"] == "MixtralForCausalLM"
    assert document["experts"] == {
        "per_layer": 8,
        "width": 192,
        "per_token": 2,
        "groups": 1,
        "moe_layers": 4,
        "layers": 4,
    }
    # 4 layers of 8 experts with three matrices of 128 x 192.
    assert document["parameters"] == {"total": 3085440, "experts": 2359296, "active": 3085440 - 2359296 * 6 // 8}
    assert (document["weights_bytes"], document["shards"]) == (6170880, 2)


def test_projections_differ_from_a_plan_by_the_router_rows_alone(run, example, quick):
    projected = {kept["experts"]: kept for kept in run("inspect", example, "--json").document()["projections"]}
    assert list(projected) == [6, 4]
    planned = run(*quick, "--dry-run", "--json").document()
    assert projected[4]["parameters"] - planned["parameters"]["after"] == 4 * 4 * 128
    assert projected[4]["weights_bytes"] - planned["weights_bytes"]["after"] == 2 * 4 * 4 * 128


def test_person_sees_experts_router_sizes_and_what_fewer_would_save(run, example):
    result = run("inspect", example)
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == f"{example} (mixtral, BF16, 4 MoE layers)"
    assert "architecture MixtralForCausalLM" in lines
    assert "router softmax over all experts, then top-k, renormalised" in lines
    assert "layers 4 of 4 decoder layers are MoE layers" in lines
    assert "experts 8 per layer, 192 neurons each, 2 per token" in lines
    assert "parameters 3.09 M, 76 % in experts, 1.32 M active per token" in lines
    assert "weights 6.2 MB BF16 in 2 shards" in lines
    assert "--experts 6 about 2.50 M parameters, 5.0 MB" in lines
    assert "--experts 4 about 1.91 M parameters, 3.8 MB" in lines
    assert f"hcsmoe convert {example} --experts 4 --dry-run" in result.stderr


def test_only_headers_are_read(run, example, headers_only):
    described, without_weights = (run("inspect", path, "--json").document() for path in (example, headers_only))
    del described["source"]["path"], without_weights["source"]["path"]
    assert described == without_weights


def test_unsupported_model_is_a_known_failure(run, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    result = run("inspect", tmp_path, "--json")
    assert (result.code, result.stdout) == (1, "")
    assert "model_type 'gpt2'" in result.stderr
    assert "Hint: see 'hcsmoe architectures'" in result.stderr
