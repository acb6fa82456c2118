"""What ``config.json`` may say: counts and sizes that cannot be, kernels and token ids that nothing here needs."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build, change_config, options, read_config, refuse

from hcsmoe_hub import convert
from hcsmoe_hub import plan as plan_conversion
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import HcsmoeError, SourceError, UnsupportedModelError
from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.model.raw_config import loading_problem
from hcsmoe_hub.model.skeleton import build_config
from hcsmoe_hub.model.source_model import read_model

HUNYUAN = {"num_experts": 8, "moe_topk": 2, "num_experts_per_tok": 2, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral: 2 layers, 8 experts, 2 per token."""
    return build(tmp_path_factory.mktemp("sound") / "model", max_shard_size="5GB")


@pytest.fixture
def source(sound: Path, tmp_path: Path) -> Path:
    """The same weights under a config of their own."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in sound.iterdir():
        (folder / file.name).hardlink_to(file)
    content = read_config(sound)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(content))
    return folder


# Counts and sizes


@pytest.mark.parametrize("value", [-8, True, "8", 8.0, 10**9, 1e9, {"a": 8}, float("nan")], ids=str)
@pytest.mark.parametrize("key", ["num_local_experts", "num_experts_per_tok", "num_hidden_layers", "vocab_size"])
def test_a_count_that_cannot_be_is_named_with_its_value(source: Path, key: str, value: Any) -> None:
    change_config(source, **{key: value})
    error = refuse(source, SourceError, options(source, 4))
    assert error.message.startswith(f"config.json says {key} = {value!r}, but it must be a whole number from ")
    assert f" says {key} = {value!r}, but " in refuse_checkpoint(source).message


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings", "vocab_size"]
)
@pytest.mark.parametrize("value", [-1, 0, 10**12])
def test_a_size_that_cannot_be_is_named_with_its_value(source: Path, key: str, value: int) -> None:
    change_config(source, **{key: value})
    assert f"config.json says {key} = {value}, but" in refuse(source, SourceError, options(source, 4)).message


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim", "num_nextn_predict_layers", "n_group"])
def test_a_number_that_a_model_may_do_without_is_not_negative(source: Path, key: str) -> None:
    change_config(source, **{key: -1})
    assert f"config.json says {key} = -1, but" in refuse(source, SourceError, options(source, 4)).message


@pytest.mark.parametrize("key", ["sliding_window", "attention_chunk_size"])
def test_a_window_without_a_limit_may_be_minus_one(source: Path, key: str) -> None:
    change_config(source, **{key: -1})
    assert plan_conversion(source, options(source, 4)).settings.experts == 4


def test_a_nested_section_is_checked_as_well() -> None:
    config = {"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_moe_text", "num_experts": -8}}
    with pytest.raises(SourceError, match=r"config\.json says num_experts = -8"):
        build_config(config)


def test_a_long_value_is_cut(source: Path) -> None:
    change_config(source, num_local_experts="8" * 1000)
    assert len(refuse(source, SourceError, options(source, 4)).message) < 200


def test_more_layers_than_are_stored_are_refused_before_they_are_built(source: Path) -> None:
    change_config(source, num_hidden_layers=9999)
    for error in (refuse(source, SourceError, options(source, 4)), refuse_checkpoint(source)):
        assert "says num_hidden_layers = 9999, but the stored tensors belong to at most 8 layers" in error.message


def refuse_checkpoint(source: Path) -> HcsmoeError:
    """The refusal to evaluate a checkpoint."""
    with pytest.raises(HcsmoeError) as caught:
        Checkpoint(LocalSource(source))
    return caught.value


@pytest.mark.parametrize("value", [0, None])
def test_a_model_without_experts_is_dense(source: Path, value: int | None) -> None:
    change_config(source, model_type="granitemoe", num_local_experts=value)
    assert "is a dense model: its config" in refuse(source, UnsupportedModelError, options(source, 4)).message


def test_a_model_that_activates_no_expert_is_not_called_dense(source: Path) -> None:
    change_config(source, num_experts_per_tok=0)
    message = refuse(source, UnsupportedModelError, options(source, 4)).message
    assert "gives 8 experts, but not how many of them are active per token" in message
    assert "dense" not in message


def test_more_active_experts_than_there_are_contradict(source: Path) -> None:
    change_config(source, num_experts_per_tok=9)
    message = refuse(source, SourceError, options(source, 4)).message
    assert message == "config.json says that 9 experts are active per token, but gives each layer 8."


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "unknown"},
        {"num_key_value_heads": 0},
        {"dtype": "float99"},
        {"text_config": 5},
        {"rope_parameters": {"rope_type": "unknown", "rope_theta": 1e4}},
        {"pad_token_id": "0"},
    ],
    ids=str,
)
def test_whatever_transformers_cannot_build_is_one_message(source: Path, changes: dict[str, Any]) -> None:
    change_config(source, **changes)
    assert "transformers cannot build a model" in refuse(source, SourceError, options(source, 4)).message
    assert "transformers cannot build a model" in refuse_checkpoint(source).message


# Lists


def test_lists_that_repeat_a_number_count_as_it_and_stay_lists(tmp_path: Path) -> None:
    source = build(tmp_path / "model", "hunyuan_v1_moe", **HUNYUAN)
    published = {
        "moe_topk": [2, 2],
        "num_experts": [8, 8],
        "moe_intermediate_size": [48, 48],
        "num_shared_expert": [1, 1],
    }
    config = {key: value for key, value in read_config(source).items() if key != "num_experts_per_tok"}
    (source / "config.json").write_text(json.dumps(config | published))
    report = convert(source, options(source, 4, experts_per_token=1))
    assert report.experts["after"] == 4
    written = read_config(tmp_path / "result")
    assert {key: written[key] for key in published} == published | {"moe_topk": [1, 1], "num_experts": [4, 4]}
    # The class of transformers takes lists for the one, but not for the other.
    (warning,) = report.warnings
    assert "transformers cannot load a checkpoint with it: " in warning
    assert "num_experts" in warning


@pytest.mark.parametrize(
    ("value", "said"), [([2, 1], "different values of moe_topk: 2, 1;"), ([], "gives an empty list as moe_topk;")]
)
def test_layers_with_different_counts_are_refused(tmp_path: Path, value: list[int], said: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        build_config({"model_type": "hunyuan_v1_moe", "num_experts": 8, "moe_topk": value})
    assert said in caught.value.message
    assert "dense" not in caught.value.message


def test_a_list_of_widths_becomes_a_number_only_where_transformers_takes_one() -> None:
    numbers = build_config({"model_type": "qwen3_moe", "moe_intermediate_size": [24, 24]})
    assert numbers.moe_intermediate_size == 24


# Kernels and token ids


@pytest.mark.parametrize(
    "changes",
    [
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "flash_attention_3"},
        {"attn_implementation": "kernels-community/flash-attn2"},
        {"attn_implementation": {"": "flash_attention_2"}},
        {"experts_implementation": "kernels-community/unknown"},
        {"_attn_implementation_internal": "flash_attention_2"},
    ],
    ids=str,
)
def test_kernels_that_are_not_installed_are_not_needed_and_stay_in_the_config(
    source: Path, changes: dict[str, Any]
) -> None:
    change_config(source, **changes)
    convert(source, options(source, 4))
    assert read_config(source.parent / "result").items() >= changes.items()
    assert Checkpoint(LocalSource(source)).vocab_size == 64


def test_kernels_in_a_nested_section_are_not_needed() -> None:
    nested = {"model_type": "qwen3_5_moe_text", "_attn_implementation": "flash_attention_2"}
    config = {
        "model_type": "qwen3_5_moe",
        "text_config": nested,
        "vision_config": dict(nested, model_type="qwen3_5_moe"),
    }
    assert build_config(config)._attn_implementation is None


@pytest.mark.parametrize("padding", [64, 10**6, -1, -(10**6)])
def test_a_padding_token_outside_the_vocabulary_is_not_needed_and_stays(source: Path, padding: int) -> None:
    change_config(source, pad_token_id=padding)
    report = convert(source, options(source, 4))
    assert read_config(source.parent / "result")["pad_token_id"] == padding
    problem = f"pad_token_id = {padding} is outside the vocabulary of 64 tokens"
    # An id of -1 counts from the end, which transformers takes.
    said = (
        []
        if padding == -1
        else [f"config.json stays as it is, but transformers cannot load a checkpoint with it: {problem}."]
    )
    assert report.warnings == said
    assert Checkpoint(LocalSource(source)).vocab_size == 64


@pytest.mark.parametrize("changes", [{"eos_token_id": [1, 2]}, {"eos_token_id": 10**9}, {"bos_token_id": -5}], ids=str)
def test_other_token_ids_do_not_matter(source: Path, changes: dict[str, Any]) -> None:
    change_config(source, **changes)
    assert read_model(LocalSource(source)).settings.experts == 8


def test_a_sound_config_has_no_problem(source: Path) -> None:
    assert loading_problem(read_config(source)) is None
