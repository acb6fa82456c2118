"""Operations of a token, next to counts by hand; parameters and bytes of every layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import SUPPORTED, save_tiny
from mapped_models import example_maps, write_result
from tiny_models import build

from hcsmoe_hub.checkpoint.modeling_hcsmoe_factored import FactorSizes
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.evaluation.cost_flops import Flops, count_flops
from hcsmoe_hub.evaluation.cost_parameters import active_parameters, count_parameters
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.model.source_model import read_model
from hcsmoe_hub.planning.factored_layout import factored_config
from hcsmoe_hub.planning.sizes import active_parameters as reported_active

CONTEXT = 40


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(LocalSource(folder))


def flops(folder: Path, context: int = CONTEXT) -> Flops:
    return count_flops(checkpoint(folder).skeleton(), context)


def attention_of(config: Any, keys: float, layers: int) -> float:
    """Scores and weighted values of one query in some layers: two operations per multiply-add, for both products."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return layers * 2 * 2 * config.num_attention_heads * width * keys


def linear_of(config: Any, *, expert: int, shared: int, gate: int) -> int:
    """Matrix products of one token: projections of attention, router, active experts, shared expert, head."""
    hidden, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or hidden // heads
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    attention = 2 * hidden * heads * width + 2 * hidden * groups * width
    block = hidden * experts + config.num_experts_per_tok * 3 * hidden * expert + 3 * hidden * shared + hidden * gate
    return 2 * (config.num_hidden_layers * (attention + block) + hidden * config.vocab_size)


def test_mixtral_equals_a_count_by_hand(tmp_path: Path) -> None:
    build(tmp_path / "model", hidden_size=64, intermediate_size=96, num_key_value_heads=2, vocab_size=200)
    model = checkpoint(tmp_path / "model")
    config = model.skeleton().config
    linear = linear_of(config, expert=config.intermediate_size, shared=0, gate=0)
    found = flops(tmp_path / "model")
    # A causal query at position p sees p + 1 keys: (C + 1) / 2 on average over a prompt.
    prefill = linear + attention_of(config, (CONTEXT + 1) / 2, config.num_hidden_layers)
    decode = linear + attention_of(config, CONTEXT + 1, config.num_hidden_layers)
    assert found.prefill == pytest.approx(prefill, rel=0.01)
    assert found.decode == pytest.approx(decode, rel=0.01)
    assert found.is_masked


def test_a_shared_expert_and_its_gate_are_counted_for_every_token(tmp_path: Path) -> None:
    sizes = {"num_experts": 12, "num_experts_per_tok": 3, "shared_expert_intermediate_size": 80, "hidden_size": 64}
    build(tmp_path / "model", "qwen2_moe", moe_intermediate_size=24, vocab_size=200, **sizes)
    config = checkpoint(tmp_path / "model").skeleton().config
    linear = linear_of(config, expert=24, shared=80, gate=1)
    found = flops(tmp_path / "model")
    assert found.prefill == pytest.approx(linear + attention_of(config, (CONTEXT + 1) / 2, 2), rel=0.01)
    assert found.decode == pytest.approx(linear + attention_of(config, CONTEXT + 1, 2), rel=0.01)


def test_windowed_layers_count_the_keys_in_their_window(tmp_path: Path) -> None:
    # Two layers, of which one sees the last eight positions.
    save_tiny("gpt_oss", tmp_path / "model")
    config = checkpoint(tmp_path / "model").skeleton().config
    assert sorted(config.layer_types) == ["full_attention", "sliding_attention"]
    assert config.sliding_window == 8
    short, long = flops(tmp_path / "model", 40), flops(tmp_path / "model", 60)
    # Only the full layer sees more keys in a longer context.
    assert long.decode - short.decode == attention_of(config, 20, 1)
    windowed = sum(min(position + 1, 8) for position in range(40)) / 40
    linear = long.decode - attention_of(config, 61, 1) - attention_of(config, 8, 1)
    assert short.prefill == pytest.approx(
        linear + attention_of(config, 20.5, 1) + attention_of(config, windowed, 1), rel=0.01
    )


# Some products of these are not one per weight: state spaces, latent attention, indexers, n-grams.
OTHER_PRODUCTS = {
    "axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "dots3_note_text",
    "glm4_moe_lite", "glm_moe_dsa", "hy_v4", "kimi_linear", "mistral4", "qwen3_5_moe_text", "qwen3_next",
    "qwen4_exp_text",
}  # fmt: skip


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_every_architecture_is_counted_and_parameters_are_those_of_the_report(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path / "model")
    source = LocalSource(tmp_path / "model")
    model, known = Checkpoint(source), read_model(source)
    found = count_flops(model.skeleton(), 16)
    counted = count_parameters(model, model.skeleton())
    active = active_parameters(model.skeleton(), found.active_experts)
    assert counted["parameters"] == known.parameters
    assert active == reported_active(known)
    if known.skeleton.is_encoder_decoder:
        # Each stack sees tokens of its own; a test of its own counts those by hand.
        return
    # Two operations per weight, of all active weights that are not looked up; norms and biases are few.
    linear = 2 * (active - counted["embedding_parameters"])
    assert found.prefill > 0.95 * linear
    if model_type not in OTHER_PRODUCTS:
        assert found.decode < 1.25 * linear
        assert found.prefill < 1.25 * linear


def test_router_rows_that_share_experts_cost_what_they_did(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "source")
    maps = example_maps(read_model(LocalSource(tmp_path / "source")))
    write_result(tmp_path / "source", tmp_path / "mapped", maps, mapped=True)
    before, after = flops(tmp_path / "source"), flops(tmp_path / "mapped")
    assert (before.prefill, before.decode) == (after.prefill, after.decode)
    whole, mapped = (checkpoint(tmp_path / name) for name in ("source", "mapped"))
    counted = [count_parameters(model, model.skeleton())["parameters"] for model in (whole, mapped)]
    assert counted[1] < counted[0]
    known = read_model(LocalSource(tmp_path / "mapped"))
    assert counted[1] == known.parameters


def test_factored_experts_cost_their_factors(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "source")
    source = read_model(LocalSource(tmp_path / "source"))
    sizes = FactorSizes(rank=3, incoming_rows=4, outgoing_rows=5)
    config = factored_config(source.source.config, source, sizes)
    skeleton = Skeleton(config, torch.float32)
    whole, found = flops(tmp_path / "source"), count_flops(skeleton, CONTEXT)
    hidden, neurons = skeleton.config.hidden_size, skeleton.config.intermediate_size
    dense = 3 * hidden * neurons
    incoming = 2 * (3 * (hidden + neurons) + 4 * hidden)
    outgoing = 3 * (hidden + neurons) + 5 * neurons
    active = skeleton.config.num_experts_per_tok * skeleton.config.num_hidden_layers
    assert whole.decode - found.decode == 2 * active * (dense - incoming - outgoing)


def test_weights_of_fewer_bits_take_fewer_bytes_on_disk_than_in_memory(tmp_path: Path) -> None:
    build(tmp_path / "model", dtype=torch.bfloat16)
    model = checkpoint(tmp_path / "model")
    found = count_parameters(model, model.skeleton(torch.float32))
    assert found["memory_bytes"] == 4 * found["parameters"]
    assert found["disk_bytes"] == 2 * found["parameters"]
    assert count_parameters(model, model.skeleton(torch.bfloat16))["memory_bytes"] == found["disk_bytes"]


def test_shared_embeddings_are_counted_once(tmp_path: Path) -> None:
    tied = build(tmp_path / "tied", tie_word_embeddings=True)
    plain = build(tmp_path / "plain", tie_word_embeddings=False)
    counts = [count_parameters(model, model.skeleton()) for model in map(checkpoint, (tied, plain))]
    assert counts[1]["parameters"] - counts[0]["parameters"] == counts[0]["embedding_parameters"]
    assert flops(tied).prefill == flops(plain).prefill
