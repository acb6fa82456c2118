"""Which tensors follow the number of experts, found by building the same model for N and for 2N experts."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hcsmoe_hub.errors import UnsupportedModelError
from hcsmoe_hub.model.blocks import ExpertTensor, MoEBlock, compare, find_blocks
from hcsmoe_hub.model.skeleton import Skeleton

E = 6
SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"q_lora_rank": 16, "qk_rope_head_dim": 8}
DEEPSEEK_V3 = LATENT | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
DEEPSEEK_V4 = LATENT | {
    "sliding_window": 8,
    "o_groups": 2,
    "o_lora_rank": 8,
    "hc_mult": 2,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "num_nextn_predict_layers": 0,
    "n_shared_experts": 1,
}
NEMOTRON_H = {
    "moe_shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "use_mamba_kernels": False,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 8,
}
GEMMA4 = {
    "enable_moe_block": True,
    "top_k_experts": 2,
    "vocab_size_per_layer_input": 32,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 8,
    "global_head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def config(model_type: str, experts: int) -> dict[str, Any]:
    """A raw config of a tiny model."""
    match model_type:
        case "mixtral":
            return SMALL | {"num_local_experts": experts}
        case "gpt_oss":
            return SMALL | {"num_local_experts": experts, "sliding_window": 8, "rope_parameters": ROPE}
        case "llama4_text":
            layers = {"num_hidden_layers": 4, "interleave_moe_layer_step": 2, "num_experts_per_tok": 1}
            return SMALL | layers | {"num_local_experts": experts, "intermediate_size_mlp": 24}
        case "deepseek_v3":
            layers = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
            return SMALL | DEEPSEEK_V3 | layers | {"n_routed_experts": experts}
        case "deepseek_v4":
            return SMALL | DEEPSEEK_V4 | {"num_hidden_layers": 4, "n_routed_experts": experts}
        case "zaya":
            return SMALL | {"num_experts": experts, "num_experts_per_tok": 1, "router_hidden_size": 16}
        case "gemma4_text":
            return SMALL | GEMMA4 | {"num_experts": experts}
        case "nemotron_h":
            layers = {"layers_block_type": ["moe", "attention", "moe"], "num_hidden_layers": 3}
            return SMALL | NEMOTRON_H | layers | {"n_routed_experts": experts}
        case "dbrx":
            shape = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 32}
            attention = {"kv_n_heads": 2, "rope_theta": 10000.0}
            experts_config = {"ffn_hidden_size": 24, "moe_num_experts": experts, "moe_top_k": 2, "hidden_size": 32}
            return shape | {"attn_config": attention, "ffn_config": experts_config}
    raise AssertionError(model_type)


def blocks_of(model_type: str) -> tuple[MoEBlock, ...]:
    small, large = (
        Skeleton(config(model_type, experts) | {"model_type": model_type}, torch.float32) for experts in (E, 2 * E)
    )
    tensors = compare(small.state, large.state, experts=E)
    return find_blocks(small.layers_by_path, tensors, small.state)


def described(tensors: tuple[ExpertTensor, ...], prefix: str) -> dict[str, tuple[int, int, int]]:
    """Dimension, rows per expert and extra rows by name within the block."""
    return {
        tensor.name.removeprefix(f"{prefix}."): (tensor.dim, tensor.rows_per_expert, tensor.extra_rows)
        for tensor in tensors
    }


ONE_ROW = (0, 1, 0)
FUSED = {"experts.gate_up_proj": ONE_ROW, "experts.down_proj": ONE_ROW}
BIASED = {"gate.weight": ONE_ROW, "gate.e_score_correction_bias": ONE_ROW}


# Real models


@pytest.mark.parametrize(
    ("model_type", "layers", "block", "experts", "router"),
    [
        ("mixtral", [0, 1], "mlp", FUSED, {"gate.weight": ONE_ROW}),
        (
            "gpt_oss",
            [0, 1],
            "mlp",
            FUSED | {"experts.gate_up_proj_bias": ONE_ROW, "experts.down_proj_bias": ONE_ROW},
            {"router.weight": ONE_ROW, "router.bias": ONE_ROW},
        ),
        ("llama4_text", [1, 3], "feed_forward", FUSED, {"router.weight": ONE_ROW}),
        ("deepseek_v3", [1, 2], "mlp", FUSED, BIASED),
        (
            "nemotron_h",
            [0, 2],
            "mixer",
            {"experts.up_proj": ONE_ROW, "experts.down_proj": ONE_ROW},
            BIASED,
        ),
        # The skip class is the last row of the router.
        (
            "zaya",
            [0, 1],
            "mlp",
            FUSED,
            {"gate.balancing_biases": (0, 1, 1), "gate.router_mlp.out_proj.weight": (0, 1, 1)},
        ),
        (
            "dbrx",
            [0, 1],
            "ffn",
            {f"experts.mlp.{name}": (0, 24, 0) for name in ("w1", "v1", "w2")},
            {"router.layer.weight": ONE_ROW},
        ),
    ],
)
def test_the_blocks_of_real_models(
    model_type: str,
    layers: list[int],
    block: str,
    experts: dict[str, tuple[int, int, int]],
    router: dict[str, tuple[int, int, int]],
) -> None:
    found = blocks_of(model_type)
    assert [one.layer for one in found] == layers
    for one in found:
        assert one.path.endswith(f".{one.layer}.{block}")
        assert one.experts_path == f"{one.path}.experts"
        assert described(one.experts, one.path) == experts
        assert described(one.router, one.path) == router
        assert one.tables == ()


def test_router_and_experts_may_hang_on_the_decoder_layer_itself() -> None:
    for number, block in enumerate(blocks_of("gemma4_text")):
        assert block.path == f"model.layers.{number}"
        assert block.experts_path == f"model.layers.{number}.experts"
        assert described(block.router, block.path) == {
            "router.proj.weight": ONE_ROW,
            "router.per_expert_scale": ONE_ROW,
        }


def test_tables_of_expert_numbers_are_found_although_their_shape_does_not_change() -> None:
    blocks = blocks_of("deepseek_v4")
    tables = [("model.layers.0.mlp.gate.tid2eid",), ("model.layers.1.mlp.gate.tid2eid",)]
    assert [block.tables for block in blocks[:2]] == tables
    assert blocks[3].tables == ()


def test_a_block_names_every_tensor_that_a_conversion_changes() -> None:
    block = blocks_of("deepseek_v4")[0]
    names = ("experts.gate_up_proj", "experts.down_proj", "gate.weight", "gate.tid2eid")
    assert block.edited == {f"model.layers.0.mlp.{name}" for name in names}


# The comparison


def shapes(**sizes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.empty(size, device="meta") for name, size in sizes.items()}


@pytest.mark.parametrize(
    ("small", "large", "expected"),
    [
        ((6, 5), (12, 5), (0, 1, 0)),
        ((6,), (12,), (0, 1, 0)),
        ((1, 6), (1, 12), (1, 1, 0)),
        ((7, 5), (13, 5), (0, 1, 1)),
        ((24, 5), (48, 5), (0, 4, 0)),
        ((5, 26), (5, 50), (1, 4, 2)),
        ((2, 3, 6), (2, 3, 12), (2, 1, 0)),
    ],
)
def test_dimension_rows_and_extra_rows_follow_from_two_shapes(
    small: tuple[int, ...], large: tuple[int, ...], expected: tuple[int, int, int]
) -> None:
    found = compare(shapes(a=small, same=(6, 12)), shapes(a=large, same=(6, 12)), experts=6)
    assert found == {"a": ExpertTensor(name="a", dim=expected[0], rows_per_expert=expected[1], extra_rows=expected[2])}


@pytest.mark.parametrize(
    ("small", "large"),
    [
        # Two dimensions follow the experts: which rows belong to whom?
        ((6, 6), (12, 12)),
        # Half a row per expert, and one and a half.
        ((6, 5), (9, 5)),
        ((6, 5), (15, 5)),
        # More rows per expert than there are rows.
        ((6, 5), (24, 5)),
        # Fewer rows for more experts.
        ((12, 5), (6, 5)),
    ],
)
def test_a_tensor_whose_rows_cannot_be_assigned_is_refused(small: tuple[int, ...], large: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        compare(shapes(odd=small), shapes(odd=large), experts=6)
    for part in ("odd", str(list(small)), str(list(large))):
        assert part in caught.value.message


# The assignment to blocks


class Expertise(nn.Module):
    """Looks like an experts module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(E, 2))

    def _apply_gate(self) -> None:
        """What transformers gives to every experts module."""


class Block(nn.Module):
    """A router next to experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(2, E)
        self.experts = Expertise()


class Layer(nn.Module):
    """A decoder layer with any number of MoE blocks."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2)
        for number in range(blocks):
            self.add_module(f"moe{number}", Block())


def find(layers: list[nn.Module], **more: Tensor) -> tuple[MoEBlock, ...]:
    """Blocks of a model whose every tensor with E rows is sized by experts."""
    model = nn.ModuleDict({"layers": nn.ModuleList(layers)})
    state: Mapping[str, Tensor] = dict(model.state_dict()) | more
    tensors = {
        name: ExpertTensor(name=name, dim=0, rows_per_expert=1, extra_rows=0)
        for name, tensor in state.items()
        if tensor.shape[0] == E
    }
    return find_blocks({f"layers.{number}": layer for number, layer in enumerate(model["layers"])}, tensors, state)


def test_a_layer_without_experts_has_no_block() -> None:
    blocks = find([Layer(0), Layer(1), Layer(0), Layer(1)])
    assert [(block.layer, block.path) for block in blocks] == [(1, "layers.1.moe0"), (3, "layers.3.moe0")]
    for block in blocks:
        assert [tensor.name for tensor in block.experts] == [f"{block.path}.experts.weight"]
        assert [tensor.name for tensor in block.router] == [f"{block.path}.gate.weight", f"{block.path}.gate.bias"]


def test_a_layer_with_two_sets_of_experts_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="layer 1 has 2 sets of experts"):
        find([Layer(1), Layer(2)])


@pytest.mark.parametrize("name", ["lm_bias", "layers.0.moe0_bias", "layers.0.norm.scale", "layers.1.norm.scale"])
def test_an_expert_sized_tensor_outside_any_block_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"tensor {name} .* outside any MoE block"):
        find([Layer(1), Layer(0)], **{name: torch.empty(E)})


def test_layers_whose_numbers_begin_alike_are_kept_apart() -> None:
    blocks = find([Layer(1) for _ in range(12)])
    for block in blocks:
        assert len(block.edited) == 3
        assert all(name.startswith(f"layers.{block.layer}.moe0.") for name in block.edited)
