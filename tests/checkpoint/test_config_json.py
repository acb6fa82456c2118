"""The raw config is edited key by key: only what the conversion changes differs from the source."""

import copy
import json
import re
from typing import Any

import pytest

from hcsmoe_hub.checkpoint.config_json import check_aliases, check_counts, edit, has_expert_count, read_settings
from hcsmoe_hub.errors import SourceError, UnsupportedModelError
from hcsmoe_hub.model.model_class import build_config

Config = dict[str, Any]

# As on the Hub: keys in an unusual order and an older spelling.
MIXTRAL: Config = {
    "vocab_size": 64,
    "torch_dtype": "bfloat16",
    "num_local_experts": 8,
    "rope_theta": 1e6,
    "hidden_size": 8,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_hidden_layers": 8,
    "rms_norm_eps": 1e-05,
    "transformers_version": "4.36.0.dev0",
    "sliding_window": None,
    "a_key_nobody_knows": {"num_local_experts": 8},
}
DEEPSEEK: Config = {
    "model_type": "deepseek_v3",
    "n_routed_experts": 32,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "num_nextn_predict_layers": 1,
}
QWEN: Config = {
    "model_type": "qwen3_5_moe",
    "text_config": {"model_type": "qwen3_5_moe_text", "num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 32},
    "vision_config": {"depth": 8, "num_experts": 8},
}


def edited(config: Config, experts: int, *, experts_per_token: int | None = None, **flags: bool) -> Config:
    """The config of a result."""
    built = build_config(config)
    before = read_settings(built)
    after = check_counts(before, experts=experts, experts_per_token=experts_per_token, label="model")
    return edit(config, built, before, after, **flags)


def changes(before: Config, after: Config) -> Config:
    """Keys whose values differ, with their new values; both must have the same keys in the same order."""
    assert list(before) == list(after)
    return {key: value for key, value in after.items() if value != before[key]}


# The count of experts


def test_only_the_count_changes_and_every_other_key_keeps_place_spelling_and_value() -> None:
    text = json.dumps(MIXTRAL)
    assert json.dumps(edited(MIXTRAL, 4)) == text.replace('"num_local_experts": 8', '"num_local_experts": 4', 1)


def test_the_config_of_the_source_is_not_modified() -> None:
    config = copy.deepcopy(QWEN)
    edited(config, 4)
    assert config == QWEN


def test_as_many_experts_as_before_change_nothing() -> None:
    assert edited(DEEPSEEK, 32) == DEEPSEEK


@pytest.mark.parametrize(
    ("config", "aliases"),
    [
        (MIXTRAL, ["num_local_experts", "num_experts"]),
        (DEEPSEEK, ["n_routed_experts", "num_local_experts", "num_experts"]),
        ({"model_type": "olmoe", "num_experts_per_tok": 2}, ["num_experts", "num_local_experts"]),
        ({"model_type": "ernie4_5_moe", "moe_k": 2}, ["moe_num_experts", "num_experts"]),
    ],
    ids=["mixtral", "deepseek_v3", "olmoe", "ernie4_5_moe"],
)
def test_every_alias_that_is_present_is_set(config: Config, aliases: list[str]) -> None:
    config = config | dict.fromkeys(aliases, 32)
    assert changes(config, edited(config, 16)) == dict.fromkeys(aliases, 16)


@pytest.mark.parametrize(
    ("config", "key", "experts"),
    [
        ({"model_type": "mixtral"}, "num_local_experts", 4),
        ({"model_type": "deepseek_v3"}, "n_routed_experts", 128),
        ({"model_type": "olmoe"}, "num_experts", 16),
        ({"model_type": "ernie4_5_moe"}, "moe_num_experts", 16),
    ],
    ids=["mixtral", "deepseek_v3", "olmoe", "ernie4_5_moe"],
)
def test_a_count_left_to_the_default_of_its_class_is_written_under_the_canonical_key(
    config: Config, key: str, experts: int
) -> None:
    result = edited(config, experts)
    assert result == config | {key: experts}
    assert read_settings(build_config(result)).experts == experts


@pytest.mark.parametrize("aliases", [{"num_local_experts": 8, "num_experts": 6}, {"num_experts": 6}])
def test_aliases_that_disagree_are_refused(aliases: dict[str, int]) -> None:
    config = {"model_type": "deepseek_v3", "n_routed_experts": 8} | aliases
    with pytest.raises(SourceError) as caught:
        check_aliases(config, read_settings(build_config(config)))
    assert "experts = " in caught.value.message
    assert {"6", "8"} <= set(re.findall(r"\d+", caught.value.message))
    assert "all names of a count must have the same value" in caught.value.hint


def test_names_of_the_count_per_token_that_disagree_are_refused() -> None:
    config = MIXTRAL | {"num_experts_per_tok": 2, "moe_topk": 4}
    with pytest.raises(SourceError, match="moe_topk = 4, but the model is built with 2 experts per token"):
        check_aliases(config, read_settings(build_config(config)))


def test_aliases_that_agree_are_accepted() -> None:
    config = MIXTRAL | {"num_experts": 8, "n_routed_experts": None}
    check_aliases(config, read_settings(build_config(config)))


# Experts per token


def test_experts_per_token_stay_unless_changed() -> None:
    assert edited(MIXTRAL, 4)["num_experts_per_tok"] == 2
    assert "num_experts_per_tok" not in edited({"model_type": "mixtral"}, 4)


def test_every_alias_of_experts_per_token_is_set() -> None:
    config = {"model_type": "hunyuan_v1_moe", "num_experts": 8, "moe_topk": 2, "num_experts_per_tok": 2}
    expected = {"num_experts": 4, "moe_topk": 1, "num_experts_per_tok": 1}
    assert changes(config, edited(config, 4, experts_per_token=1)) == expected


def test_experts_per_token_left_to_the_default_are_written_when_changed() -> None:
    config = {"model_type": "mixtral", "num_local_experts": 8}
    result = edited(config, 4, experts_per_token=1)
    assert result == config | {"num_local_experts": 4, "num_experts_per_tok": 1}


# Groups


def test_groups_stay_when_the_experts_can_be_split_into_them() -> None:
    assert changes(DEEPSEEK, edited(DEEPSEEK, 16)) == {"n_routed_experts": 16}


def test_groups_are_reset_when_the_experts_cannot_be_split_into_them() -> None:
    expected = {"n_routed_experts": 18, "n_group": 1, "topk_group": 1}
    assert changes(DEEPSEEK, edited(DEEPSEEK, 18)) == expected


def test_groups_left_to_the_default_are_written_when_they_are_reset() -> None:
    config = {"model_type": "deepseek_v3", "n_routed_experts": 256}
    expected = config | {"n_routed_experts": 100, "n_group": 1, "topk_group": 1}
    assert edited(config, 100) == expected


# Nested sections


def test_a_nested_text_config_is_edited_and_other_sections_are_not() -> None:
    result = edited(QWEN, 4)
    assert changes(QWEN, result) == {"text_config": QWEN["text_config"] | {"num_experts": 4}}


def test_a_default_goes_to_the_nested_text_config() -> None:
    config = {"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_moe_text"}}
    result = edited(config, 16)
    assert changes(config, result) == {"text_config": {"model_type": "qwen3_5_moe_text", "num_experts": 16}}


def test_the_ffn_config_of_dbrx_is_edited() -> None:
    ffn = {"ffn_hidden_size": 16, "moe_num_experts": 16, "moe_top_k": 4, "moe_jitter_eps": 0}
    config = {"d_model": 16, "ffn_config": ffn, "model_type": "dbrx", "n_heads": 4}
    result = edited(config, 8, experts_per_token=2)
    assert changes(config, result) == {"ffn_config": ffn | {"moe_num_experts": 8, "moe_top_k": 2}}
    assert list(result["ffn_config"]) == list(ffn)


# What was dropped, and what was dequantised


def test_prediction_layers_are_zeroed_only_when_they_were_dropped() -> None:
    assert edited(DEEPSEEK, 16)["num_nextn_predict_layers"] == 1
    expected = {"n_routed_experts": 16, "num_nextn_predict_layers": 0}
    assert changes(DEEPSEEK, edited(DEEPSEEK, 16, without_mtp=True)) == expected


def test_prediction_layers_are_zeroed_in_nested_sections() -> None:
    config = QWEN | {"text_config": QWEN["text_config"] | {"mtp_num_hidden_layers": 1}}
    assert edited(config, 4, without_mtp=True)["text_config"]["mtp_num_hidden_layers"] == 0


def test_without_a_key_for_prediction_layers_none_is_added() -> None:
    assert list(edited(MIXTRAL, 4, without_mtp=True)) == list(MIXTRAL)


@pytest.mark.parametrize("section", [None, "text_config"])
def test_quantization_is_removed_only_when_the_weights_were_dequantised(section: str | None) -> None:
    config = copy.deepcopy(QWEN)
    method = {"quant_method": "fp8"}
    (config if section is None else config[section])["quantization_config"] = method
    kept = edited(config, 4)
    assert (kept if section is None else kept[section])["quantization_config"] == method
    assert edited(config, 4, without_quantization=True) == edited(QWEN, 4)


# What a config says


def test_a_dense_config_has_no_settings() -> None:
    config = {"model_type": "llama", "num_hidden_layers": 2}
    assert not has_expert_count(config)
    with pytest.raises(UnsupportedModelError) as caught:
        read_settings(build_config(config))
    assert "'llama' is a dense model" in caught.value.message
    assert "Mixture-of-Experts" in caught.value.hint


def test_settings_include_defaults_and_groups() -> None:
    settings = read_settings(build_config({"model_type": "deepseek_v3", "n_routed_experts": 64, "n_group": 4}))
    assert (settings.experts, settings.experts_per_token) == (64, 8)
    assert (settings.groups, settings.groups_per_token) == (4, 4)


def test_settings_of_a_router_without_groups_are_one_group() -> None:
    settings = read_settings(build_config(MIXTRAL))
    assert (settings.groups, settings.groups_per_token) == (1, 1)
