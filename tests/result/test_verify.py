"""A sound result passes; whatever is damaged, stale or foreign is named."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import INDEX, build, change_config, change_tensors, options, read_tensors
from torch import Tensor

import hcsmoe_hub.result.verify
from hcsmoe_hub import convert
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import HcsmoeError, SourceError, VerificationError
from hcsmoe_hub.result.verify import GENERATED_TOKENS, check_structure, verify

EXPERTS = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
ROUTER = "model.layers.0.block_sparse_moe.gate.weight"
NORM = "model.layers.1.input_layernorm.weight"
MATRICES = ("w1", "w2", "w3")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral, and tensors that it does not load."""
    folder = build(tmp_path_factory.mktemp("verify") / "model", dtype=torch.bfloat16)
    change_tensors(folder, lambda tensors: tensors.update({"vision_tower.blocks.0.weight": torch.ones(3, 3)}))
    return folder


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    """Its result with 4 experts, in several shards."""
    convert(source, options(source, 4, max_shard_size="20KB"))
    return source.parent / "result"


@pytest.fixture(scope="module")
def unchanged(source: Path) -> Path:
    """Its result with all experts."""
    convert(source, options(source, 8, output=source.parent / "unchanged"))
    return source.parent / "unchanged"


@pytest.fixture
def result(converted: Path, tmp_path: Path) -> Path:
    """A copy of the result, to be damaged."""
    return shutil.copytree(converted, tmp_path / "result")


@pytest.fixture
def without_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the fresh process, which takes seconds, where something else is tested."""
    monkeypatch.setattr(hcsmoe_hub.result.verify, "_reload", lambda model: [])


def fails(folder: Path, kind: type[HcsmoeError], *says: str, check: Callable[[Path], object] = check_structure) -> None:
    """Checks that a folder is refused with an error of one kind that says certain things and what to do."""
    with pytest.raises(kind) as caught:
        check(folder)
    assert type(caught.value) is kind
    assert [text for text in says if text not in caught.value.message] == []
    assert caught.value.hint


def test_a_sound_result_passes_and_is_described(source: Path, converted: Path) -> None:
    found = verify(converted, against=LocalSource(source))
    tensors = read_tensors(converted)
    assert (found.tensors, found.weights_bytes) == (len(tensors), sum(tensor.nbytes for tensor in tensors.values()))
    assert (found.experts, found.moe_layers) == (4, 2)
    # Everything but three matrices of four experts and a router, in two layers.
    assert found.identical == len(tensors) - 2 * (3 * 4 + 1)
    assert len(found.generated) == GENERATED_TOKENS
    assert all(0 <= token < 64 for token in found.generated)


@pytest.mark.parametrize(
    "name",
    [
        ".cache/huggingface/download/model.safetensors.abc.incomplete",
        "logs/run.incomplete",
        "._model-00001-of-00002.safetensors",
        "old/model.safetensors",
    ],
)
def test_files_of_other_programs_are_not_part_of_a_result(result: Path, name: str) -> None:
    (result / name).parent.mkdir(parents=True, exist_ok=True)
    (result / name).write_bytes(b"x")
    check_structure(result)


def test_an_unfinished_shard_is_named(result: Path) -> None:
    (result / "model-00009-of-00009.safetensors.incomplete").touch()
    fails(result, VerificationError, "holds unfinished files: model-00009-of-00009.safetensors.incomplete")


def test_shards_without_an_index_are_not_a_result(result: Path) -> None:
    (result / INDEX).unlink()
    fails(result, VerificationError, f"has no {INDEX}, without which transformers does not load its shards")


def test_a_model_that_overflows_while_it_generates_fails(result: Path) -> None:
    # Every single number is finite, so only running the model shows the overflow.
    change_tensors(result, lambda tensors: tensors["lm_head.weight"].fill_(3e38))
    change_tensors(result, lambda tensors: tensors["model.norm.weight"].fill_(3e38))
    fails(result, VerificationError, "does not generate", "values overflow in ", check=verify)


@pytest.mark.parametrize(
    "defaults",
    [
        {"stop_strings": ["x"], "num_beams": 4, "num_beam_groups": 2},
        {"penalty_alpha": 0.6, "top_k": 4, "dola_layers": "high", "max_length": 1},
        {"return_dict_in_generate": True, "bad_words_ids": [[10**6]], "cache_implementation": "quantized"},
    ],
    ids=lambda defaults: "+".join(defaults),
)
def test_what_only_generate_refuses_does_not_matter(result: Path, defaults: dict[str, Any]) -> None:
    (result / "generation_config.json").write_text(json.dumps(defaults))
    assert len(verify(result).generated) == GENERATED_TOKENS


@pytest.mark.parametrize("content", ["{", '{"num_return_sequences": 3}'])
def test_defaults_that_transformers_cannot_read_are_named(result: Path, content: str) -> None:
    (result / "generation_config.json").write_text(content)
    fails(result, VerificationError, f"cannot read {result / 'generation_config.json'}: ", check=verify)


def test_a_config_that_transformers_cannot_load_is_named(result: Path) -> None:
    change_config(result, pad_token_id=64)
    fails(result, VerificationError, "pad_token_id = 64 is outside the vocabulary of 64 tokens", check=verify)


def test_kernels_that_are_not_installed_are_not_needed(result: Path) -> None:
    change_config(result, _attn_implementation="flash_attention_2")
    assert len(verify(result).generated) == GENERATED_TOKENS


def test_a_result_without_a_report_is_checked_like_any_checkpoint(result: Path) -> None:
    (result / "hcsmoe.json").unlink()
    assert check_structure(result).settings.experts == 4


def test_a_source_is_a_sound_checkpoint_itself(source: Path) -> None:
    assert check_structure(source).settings.experts == 8


# Structure


def rename_expert(old: int, new: int) -> Callable[[dict[str, Tensor]], None]:
    """Gives one expert of every layer another number."""

    def rename(tensors: dict[str, Tensor]) -> None:
        for layer in (0, 1):
            for matrix in MATRICES:
                tensors[EXPERTS.format(layer, new, matrix)] = tensors.pop(EXPERTS.format(layer, old, matrix))

    return rename


def test_expert_numbers_with_a_gap_fail(result: Path) -> None:
    change_tensors(result, rename_expert(3, 7))
    fails(result, SourceError, "model.layers.0.block_sparse_moe.experts.3.")


def test_a_missing_expert_fails(result: Path) -> None:
    change_tensors(result, lambda tensors: [tensors.pop(EXPERTS.format(1, 3, matrix)) for matrix in MATRICES])
    fails(result, SourceError, "model.layers.1.block_sparse_moe.")


def test_one_matrix_missing_of_one_expert_fails(result: Path) -> None:
    change_tensors(result, lambda tensors: tensors.pop(EXPERTS.format(0, 2, "w3")))
    fails(result, SourceError, "model.layers.0.block_sparse_moe.experts.")


def test_a_router_with_the_rows_of_the_source_fails(source: Path, result: Path) -> None:
    change_tensors(result, lambda tensors: tensors.update({ROUTER: read_tensors(source)[ROUTER]}))
    fails(result, SourceError, ROUTER, "[8, 32]", "[4, 32]")


def test_a_count_that_config_did_not_follow_fails(result: Path) -> None:
    change_config(result, num_local_experts=8)
    fails(result, SourceError, "config.json describes")


def test_an_alias_that_did_not_follow_fails(result: Path) -> None:
    change_config(result, n_routed_experts=8)
    fails(result, SourceError, "n_routed_experts = 8")


def test_a_report_that_declares_another_count_fails(result: Path) -> None:
    report = json.loads((result / "hcsmoe.json").read_text())
    report["experts"]["after"] = 6
    (result / "hcsmoe.json").write_text(json.dumps(report))
    fails(result, VerificationError, "hcsmoe.json declares 6 experts, config.json 4")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"experts": 4}', '{"experts": {}}'])
def test_a_report_that_cannot_be_read_is_a_known_failure(result: Path, content: str) -> None:
    (result / "hcsmoe.json").write_text(content)
    with pytest.raises(HcsmoeError, match=r"hcsmoe\.json"):
        check_structure(result)


def test_a_stray_shard_fails(result: Path) -> None:
    shutil.copy(next(result.glob("*.safetensors")), result / "model-00001-of-00009.safetensors")
    fails(result, VerificationError, "shards that its index does not list: model-00001-of-00009.safetensors")


def test_a_tensor_that_the_index_does_not_list_fails(result: Path) -> None:
    index = json.loads((result / INDEX).read_text())
    del index["weight_map"][NORM]
    (result / INDEX).write_text(json.dumps(index))
    fails(result, VerificationError, "does not list 1 stored tensors", NORM)


@pytest.mark.parametrize("name", ["model-00005-of-00005.safetensors.incomplete", "config.json.incomplete"])
def test_an_unfinished_file_fails(result: Path, name: str) -> None:
    (result / name).touch()
    fails(result, VerificationError, f"holds unfinished files: {name}")


def test_a_folder_without_a_config_is_not_a_checkpoint(result: Path) -> None:
    (result / "config.json").unlink()
    fails(result, SourceError, "has no config.json")


# Numbers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (NORM, float("nan")),
        (EXPERTS.format(0, 2, "w1"), float("inf")),
        ("vision_tower.blocks.0.weight", float("-inf")),
    ],
)
def test_a_number_that_is_not_finite_fails(result: Path, name: str, value: float) -> None:
    def spoil(tensors: Mapping[str, Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    change_tensors(result, spoil)
    fails(result, VerificationError, f"tensor {name!r} in model-", "is not finite", check=verify)


# Against the source


def flip_bit(folder: Path, name: str) -> None:
    """Changes the last bit of the first number of a tensor."""

    def flip(tensors: Mapping[str, Tensor]) -> None:
        tensors[name].view(-1).view(torch.uint8)[0] ^= 1

    change_tensors(folder, flip)


@pytest.mark.parametrize("name", [NORM, "model.embed_tokens.weight", "vision_tower.blocks.0.weight"])
def test_one_flipped_bit_outside_the_experts_is_found(source: Path, result: Path, name: str) -> None:
    flip_bit(result, name)
    says = f"tensor {name!r} differs from {source}, although the conversion only copies it"
    fails(result, VerificationError, says, check=lambda folder: verify(folder, against=LocalSource(source)))


def test_another_dtype_of_the_same_numbers_is_found(source: Path, result: Path) -> None:
    change_tensors(result, lambda tensors: tensors.update({NORM: tensors[NORM].float()}))
    fails(result, VerificationError, NORM, check=lambda folder: verify(folder, against=LocalSource(source)))


@pytest.mark.usefixtures("without_reload")
def test_merged_tensors_are_not_compared(source: Path, result: Path) -> None:
    sound = verify(result, against=LocalSource(source)).identical
    flip_bit(result, EXPERTS.format(0, 1, "w2"))
    flip_bit(result, ROUTER)
    assert verify(result, against=LocalSource(source)).identical == sound


@pytest.mark.usefixtures("without_reload")
def test_every_tensor_is_compared_when_no_expert_was_merged(source: Path, unchanged: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(unchanged, tmp_path / "result")
    assert verify(folder, against=LocalSource(source)).identical == len(read_tensors(source))
    name = EXPERTS.format(0, 1, "w2")
    flip_bit(folder, name)
    fails(folder, VerificationError, name, check=lambda folder: verify(folder, against=LocalSource(source)))


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("mixtral", {"num_hidden_layers": 1}),
        ("mixtral", {"num_hidden_layers": 3}),
        ("mixtral", {"hidden_size": 64}),
        ("qwen3_moe", {}),
        # The same architecture, sizes and names, but other numbers.
        ("mixtral", {"num_local_experts": 6}),
    ],
    ids=["fewer_layers", "more_layers", "other_size", "other_architecture", "other_numbers"],
)
def test_a_checkpoint_that_is_not_the_source_is_found(
    result: Path, tmp_path: Path, model_type: str, settings: dict[str, int]
) -> None:
    other = build(tmp_path / "other", model_type, dtype=torch.bfloat16, **settings)
    with pytest.raises(VerificationError, match=r"is not the source|differs from") as caught:
        verify(result, against=LocalSource(other))
    assert str(other) in caught.value.message


@pytest.mark.usefixtures("without_reload")
def test_a_tensor_of_the_source_that_the_result_lost_is_found(source: Path, result: Path) -> None:
    name = "vision_tower.blocks.0.weight"
    change_tensors(result, lambda tensors: tensors.pop(name))
    fails(result, VerificationError, name, check=lambda folder: verify(folder, against=LocalSource(source)))
