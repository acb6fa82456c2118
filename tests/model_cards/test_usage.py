"""Every command in a card is true of the architecture, the layout and the number of experts."""

from typing import Any

import pytest

from hcsmoe_hub.checkpoint.auto_class import WRONG_EXPERTS
from hcsmoe_hub.model_cards.folder import read_card_data
from hcsmoe_hub.model_cards.metadata import front_matter
from hcsmoe_hub.model_cards.programs import expert_parallel_sizes, programs_for, tensor_parallel_sizes
from hcsmoe_hub.model_cards.render import render_body
from hcsmoe_hub.options import Layout, MethodOptions
from hcsmoe_hub.recipe.resolve import resolve

CONFIGS = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 14336},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 768},
    "olmoe": {"num_experts": 4, "intermediate_size": 1024},
    "deepseek_v2": {"n_routed_experts": 4},
    "deepseek_v3": {"n_routed_experts": 4},
    "glm4_moe": {"n_routed_experts": 4},
    "switch_transformers": {"num_experts": 4, "d_model": 768, "d_ff": 3072, "num_heads": 12},
    "nllb-moe": {"num_experts": 64, "d_model": 2048, "encoder_ffn_dim": 8192, "decoder_ffn_dim": 8192},
}
ALL = ["vLLM", "SGLang", "llama.cpp", "mlx-lm"]
FUSED = ("model.layers.0.mlp.experts.gate_up_proj",)
SINGLE = ("model.layers.0.mlp.experts.0.gate_proj.weight",)


@pytest.fixture
def facts(make_folder: Any) -> Any:
    """Facts of a result of an architecture."""

    def make(model_type: str = "mixtral", **arguments: Any) -> Any:
        config = {"num_local_experts": None, **CONFIGS[model_type], **arguments.pop("config", {})}
        given = {key: value for key, value in config.items() if value is not None}
        folder = make_folder(
            {"source": {"model_type": model_type}, **arguments.pop("changes", {})},
            **{"tensors": SINGLE, **arguments},
        )
        found, _ = read_card_data(folder, None)
        return type(found)(**{name: getattr(found, name) for name in found.__slots__} | {"config": {**BASE, **given}})

    return make


def usage(card: Any) -> str:
    """The section on usage."""
    return render_body(card, "").partition("\n## Use\n")[2].partition("\n## Quality\n")[0]


BASE = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 1e6,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("mixtral", ALL),
        ("qwen2_moe", ALL),
        ("qwen3_moe", ALL),
        ("olmoe", ALL),
        ("deepseek_v2", ["llama.cpp"]),
        ("deepseek_v3", ["llama.cpp", "mlx-lm"]),
        ("glm4_moe", []),
    ],
)
def test_programs_are_those_that_are_known_to_run_the_architecture(
    facts: Any, model_type: str, expected: list[str]
) -> None:
    found = facts(model_type)
    assert [program.name for program in programs_for(found)] == expected
    text = usage(found)
    commands = {"vLLM": "vllm serve", "SGLang": "sglang.launch", "llama.cpp": "convert_hf", "mlx-lm": "mlx_lm"}
    assert {name for name, command in commands.items() if command in text} == set(expected)
    assert ("No checkpoint of this architecture" in text) is (expected == [])


def test_fused_experts_are_only_for_programs_that_take_them(facts: Any) -> None:
    assert [program.name for program in programs_for(facts(tensors=FUSED))] == ["vLLM"]


@pytest.mark.parametrize(
    ("model_type", "key"), [("mixtral", "rope_theta"), ("qwen3_moe", "num_experts")], ids=["rope", "count"]
)
def test_a_config_in_the_words_of_transformers_5_is_nothing_for_mlx(facts: Any, model_type: str, key: str) -> None:
    found = facts(model_type)
    config = {name: value for name, value in found.config.items() if name != key}
    slots = {name: getattr(found, name) for name in found.__slots__}
    assert "mlx-lm" not in [program.name for program in programs_for(type(found)(**slots | {"config": config}))]


def test_the_mapped_layout_loads_in_transformers_alone_and_says_what_that_runs(facts: Any) -> None:
    text = usage(facts(changes={"method": resolve(MethodOptions(layout=Layout.MAPPED)).as_dict()}))
    assert "trust_remote_code=True" in text
    assert "modeling_hcsmoe.py" in text
    assert not any(word in text for word in ("vllm", "sglang", "gguf", "mlx"))


def test_plain_layouts_ask_for_no_trust(facts: Any) -> None:
    assert "trust_remote_code" not in usage(facts())


@pytest.mark.parametrize(
    ("experts", "tensor", "expert"),
    [(4, [1, 2, 4], [1, 2, 4]), (3, [1, 2], [1, 3]), (6, [1, 2, 4], [1, 2, 3, 6])],
)
def test_parallel_sizes_fit_the_experts_that_are_left(
    facts: Any, experts: int, tensor: list[int], expert: list[int]
) -> None:
    found = facts(changes={"experts": {"after": experts}})
    assert tensor_parallel_sizes(found) == tensor
    assert expert_parallel_sizes(found) == expert


def test_the_full_layout_is_as_parallel_as_the_base(facts: Any) -> None:
    found = facts(changes={"method": {"layout": "full"}})
    assert tensor_parallel_sizes(found) == [1, 2, 4, 8]


def test_widths_limit_tensor_parallelism(facts: Any) -> None:
    assert tensor_parallel_sizes(facts(config={"intermediate_size": 14}, changes={"experts": {"after": 8}})) == [1, 2]


def test_sizes_that_only_the_class_of_the_config_knows_are_not_guessed(facts: Any) -> None:
    found = facts(config={"intermediate_size": None})
    assert tensor_parallel_sizes(found) == []
    assert "--tensor-parallel-size" not in usage(found)


def test_without_a_tokenizer_only_the_model_is_loaded(facts: Any) -> None:
    text = usage(facts(files=()))
    assert "It has no tokenizer" in text
    assert not any(word in text for word in ("AutoTokenizer", "vllm", "sglang", "gguf", "mlx"))


# Encoder-decoder models


def test_a_model_that_fills_gaps_is_loaded_with_its_own_class_and_asked_to_fill_some(facts: Any) -> None:
    text = usage(facts("switch_transformers"))
    assert "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer\n" in text
    assert "AutoModelForSeq2SeqLM.from_pretrained(" in text
    assert 'tokenizer("The <extra_id_0> is blue because it scatters <extra_id_1>."' in text
    # Special tokens show which gap is filled.
    assert "print(tokenizer.decode(output[0]))\n" in text
    assert "CausalLM" not in text


def test_a_translator_is_given_both_languages(facts: Any) -> None:
    text = usage(facts("nllb-moe"))
    assert 'src_lang="eng_Latn")' in text
    assert 'french = tokenizer.convert_tokens_to_ids("fra_Latn")' in text
    assert "model.generate(**inputs, forced_bos_token_id=french, max_new_tokens=100)" in text


@pytest.mark.parametrize("model_type", ["switch_transformers", "nllb-moe"])
def test_no_other_program_is_known_to_run_an_encoder_decoder_model(facts: Any, model_type: str) -> None:
    found = facts(model_type)
    assert programs_for(found) == []
    assert "No checkpoint of this architecture" in usage(found)


@pytest.mark.parametrize("warnings", [[], ["another warning.", f"transformers 5.23.0 {WRONG_EXPERTS} of a model."]])
def test_a_version_that_runs_the_wrong_experts_is_named_where_the_model_is_loaded(
    facts: Any, warnings: list[str]
) -> None:
    text = usage(facts("nllb-moe", changes={"warnings": warnings}))
    assert ("**transformers 5.23.0 runs experts 0 and 1 only of a model.**" in text) is bool(warnings)
    assert "another warning" not in text


@pytest.mark.parametrize("model_type", ["mixtral", "switch_transformers", "nllb-moe"])
def test_the_hub_lists_a_result_under_the_task_of_its_kind(facts: Any, model_type: str) -> None:
    tasks = {"mixtral": "text-generation", "switch_transformers": "text2text-generation", "nllb-moe": "translation"}
    assert front_matter(facts(model_type)).pipeline_tag == tasks[model_type]
