"""An MTP head is recognised by its published names, and computes as transformers' own."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_layers import MtpLayer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextDecoderLayer, Qwen3NextRMSNorm

from hcsmoe_hub.model.mtp import add_parts, enter, find_head, has_experts, running_head, why_unknown, with_head

EXPERT = "mlp.experts.0.gate_proj.weight"
NUMBERED = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight", EXPERT)
NAMED = (
    "fc.weight",
    "norm.weight",
    "pre_fc_norm_embedding.weight",
    "pre_fc_norm_hidden.weight",
    f"layers.0.{EXPERT}",
)


def config(model_type: str, layers: int = 4, **settings: object) -> PreTrainedConfig:
    """The config of a model of a few layers."""
    return AutoConfig.for_model(model_type, num_hidden_layers=layers, hidden_size=16, **settings)


def keys(prefix: str, names: tuple[str, ...]) -> list[str]:
    """Stored keys of a head, and one of the model."""
    return ["model.norm.weight", *(prefix + name for name in names)]


@pytest.mark.parametrize("model_type", ["deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"])
def test_the_layer_after_the_last_one_is_a_head(model_type: str) -> None:
    stored = keys("model.layers.4.", (*NUMBERED, "embed_tokens.weight", "shared_head.head.weight"))
    head = find_head(stored, config(model_type))
    assert head is not None
    assert (head.layer, head.keys) == (4, frozenset(stored[1:]))
    assert head.copies == {"model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight"}
    assert [head.as_layer(key, "model.layers") for key in stored] == stored


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_moe_text", "qwen3_5_moe"])
def test_the_head_of_qwen_gets_the_names_of_a_layer(model_type: str) -> None:
    text = {"text_config": {"num_hidden_layers": 4}} if model_type == "qwen3_5_moe" else {}
    stored = keys("mtp.", NAMED)
    head = find_head(stored, AutoConfig.for_model(model_type, **(text or {"num_hidden_layers": 4})))
    assert head is not None
    assert [head.as_layer(key, "model.layers") for key in stored] == [
        "model.norm.weight",
        "model.layers.4.eh_proj.weight",
        "model.layers.4.shared_head.norm.weight",
        "model.layers.4.enorm.weight",
        "model.layers.4.hnorm.weight",
        f"model.layers.4.{EXPERT}",
    ]


@pytest.mark.parametrize(
    "stored",
    [
        pytest.param(keys("model.layers.4.", NUMBERED[:-1]), id="dense"),
        pytest.param(keys("model.layers.4.", NUMBERED[1:]), id="part missing"),
        pytest.param(keys("model.layers.4.", NUMBERED) + keys("model.layers.5.", NUMBERED), id="two"),
        pytest.param(keys("model.layers.5.", NUMBERED), id="another number"),
        pytest.param(keys("mtp.", (*NAMED, "layers.1.mlp.gate.weight")), id="two layers"),
        pytest.param(keys("mtp.", NAMED[1:]), id="named, part missing"),
    ],
)
def test_other_heads_are_not_taken_for_one(stored: list[str]) -> None:
    assert find_head(stored, config("deepseek_v3")) is None
    assert "are not those of the one head" in why_unknown(config("deepseek_v3"))


def test_the_head_of_an_unknown_family_is_not_taken_for_one() -> None:
    assert find_head(keys("model.layers.4.", NUMBERED), config("hy_v3")) is None
    assert why_unknown(config("hy_v3")) == "and how a head of hy_v3 computes is not known"


def test_experts_are_told_from_dense_projections() -> None:
    assert has_experts(["mtp.norm.weight", "mtp.layers.0.mlp.shared_expert.up_proj.weight"])
    assert has_experts(["mtp.layers.0.mlp.experts.gate_up_proj"])
    assert not has_experts(["model.mtp_block.0.mlp.gate_proj.weight", "model.mtp_linear_proj.0.weight"])


def test_a_config_runs_its_own_layers_again_after_a_head_was_built_or_run() -> None:
    described = config("qwen3_next", layer_types=["linear_attention"] * 3 + ["full_attention"])
    with with_head(described):
        assert described.num_hidden_layers == 5
        assert described.layer_types[4] == "full_attention"
    kinds = list(described.layer_types)
    with running_head(described):
        assert (described.num_hidden_layers, set(described.layer_types)) == (1, {"full_attention"})
    assert (described.num_hidden_layers, described.layer_types) == (4, kinds)


def test_a_head_has_the_attention_of_an_indexed_decoder() -> None:
    described = config("glm_moe_dsa", mlp_layer_types=["dense"] * 4)
    with with_head(described):
        pass
    last = (described.layer_types[4], described.mlp_layer_types[4], described.indexer_types[4])
    assert last == ("indexed_attention", "sparse", "full")


def test_a_head_computes_what_that_of_transformers_does() -> None:
    torch.manual_seed(0)
    described = config("qwen3_next", layer_types=["full_attention"] * 4)
    theirs = MtpLayer(described, Qwen3NextDecoderLayer, Qwen3NextRMSNorm, 0)
    theirs.mtp_block = nn.Identity()
    theirs.mtp_block.forward = lambda states, **others: states
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = nn.Module()
    ours.input_layernorm = Qwen3NextRMSNorm(16)
    add_parts(ours, described, torch.float32)
    assert {tensor.device.type for name, tensor in ours.state_dict().items() if "input" not in name} == {"meta"}
    names = {name.replace("post_norm", "shared_head.norm"): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(names, assign=True, strict=False)
    embeddings, hidden = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    nothing = dict.fromkeys(("position_embeddings", "attention_mask", "position_ids", "past_key_values"))
    with torch.no_grad():
        assert torch.equal(
            ours.shared_head["norm"](enter(ours, embeddings, hidden)), theirs(embeddings, hidden, **nothing)
        )
