"""Qwen with vision or sound: Qwen3-VL, Qwen3.5 and Qwen3-Omni."""

from published.checkpoint import Checkpoint
from published.collector import NORMS, Config, Tensors, attention, embeddings, head_dim
from published.qwen import (
    delta_sizes,
    gated_attention,
    is_full,
    multi_token_prediction,
    qk_norms,
    shared_expert,
)

TEXT = "model.language_model."


def vision_tower(t: Tensors, prefix: str, config: Config) -> None:
    """The vision tower of Qwen3-VL and its successors."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    wide = config["spatial_merge_size"] ** 2 * hidden
    patch = (config["temporal_patch_size"], config["patch_size"], config["patch_size"])
    t.add(f"{prefix}.patch_embed.proj.weight", hidden, config["in_channels"], *patch)
    t.add(f"{prefix}.patch_embed.proj.bias", hidden)
    t.add(f"{prefix}.pos_embed.weight", config["num_position_embeddings"], hidden)
    for block in range(config["depth"]):
        p = f"{prefix}.blocks.{block}"
        t.norms(p, ("norm1", "norm2"), hidden, bias=True)
        t.linear(f"{p}.attn.qkv", 3 * hidden, hidden, bias=True)
        t.linear(f"{p}.attn.proj", hidden, hidden, bias=True)
        t.linear(f"{p}.mlp.linear_fc1", inner, hidden, bias=True)
        t.linear(f"{p}.mlp.linear_fc2", hidden, inner, bias=True)
    deep = [f"deepstack_merger_list.{number}" for number in range(len(config["deepstack_visual_indexes"]))]
    for name in ["merger", *deep]:
        t.norm(f"{prefix}.{name}.norm", wide if name in deep else hidden, bias=True)
        t.linear(f"{prefix}.{name}.linear_fc1", wide, wide, bias=True)
        t.linear(f"{prefix}.{name}.linear_fc2", config["out_hidden_size"], wide, bias=True)


def qwen3_vl(t: Tensors, config: Config) -> None:
    """Qwen3-VL: the text model of Qwen3 with its experts in one tensor, input dimension first."""
    text = config["text_config"]
    hidden, experts, inner = text["hidden_size"], text["num_experts"], text["moe_intermediate_size"]
    embeddings(t, text, TEXT)
    for layer in range(text["num_hidden_layers"]):
        p = f"{TEXT}layers.{layer}"
        t.norms(p, NORMS, hidden)
        attention(t, f"{p}.self_attn", text)
        qk_norms(t, f"{p}.self_attn", head_dim(text))
        t.linear(f"{p}.mlp.gate", experts, hidden)
        t.add(f"{p}.mlp.experts.gate_up_proj", experts, hidden, 2 * inner)
        t.add(f"{p}.mlp.experts.down_proj", experts, inner, hidden)
    vision_tower(t, "model.visual", config["vision_config"])


def qwen3_5(t: Tensors, config: Config) -> None:
    """Qwen3.5: as Qwen3-Next, with experts in one tensor and linear attention in four projections."""
    text = config["text_config"]
    hidden, experts, inner = text["hidden_size"], text["num_experts"], text["moe_intermediate_size"]
    embeddings(t, text, TEXT)
    layers = [(f"{TEXT}layers.{layer}", is_full(text, layer)) for layer in range(text["num_hidden_layers"])]
    for p, full in [*layers, ("mtp.layers.0", True)]:
        t.norms(p, NORMS, hidden)
        if full:
            gated_attention(t, f"{p}.self_attn", text)
        else:
            _linear_attention(t, f"{p}.linear_attn", text)
        t.linear(f"{p}.mlp.gate", experts, hidden)
        t.add(f"{p}.mlp.experts.gate_up_proj", experts, 2 * inner, hidden)
        t.add(f"{p}.mlp.experts.down_proj", experts, hidden, inner)
        shared_expert(t, f"{p}.mlp", text)
    vision_tower(t, "model.visual", config["vision_config"])
    multi_token_prediction(t, text)


def _linear_attention(t: Tensors, name: str, config: Config) -> None:
    hidden = config["hidden_size"]
    keys, values, heads = delta_sizes(config)
    t.add(f"{name}.A_log", heads, dtype="F32")
    t.add(f"{name}.dt_bias", heads)
    t.add(f"{name}.conv1d.weight", 2 * keys + values, 1, config["linear_conv_kernel_dim"])
    for projection, rows in (("qkv", 2 * keys + values), ("z", values), ("a", heads), ("b", heads)):
        t.linear(f"{name}.in_proj_{projection}", rows, hidden)
    t.norm(f"{name}.norm", config["linear_value_head_dim"], dtype="F32")
    t.linear(f"{name}.out_proj", hidden, values)


TINY_VISION = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_heads": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": 40,
    "patch_size": 4,
}
IMAGE_IDS = {"image_token_id": 61, "video_token_id": 62, "vision_start_token_id": 63, "vision_end_token_id": 64}

CHECKPOINTS = (
    Checkpoint(
        repo="Qwen/Qwen3-VL-30B-A3B-Instruct",
        tensors=qwen3_vl,
        billions=31.1,
        tiny={"vision_config": TINY_VISION | {"deepstack_visual_indexes": [0, 1, 2]}, **IMAGE_IDS},
    ),
    Checkpoint(
        repo="Qwen/Qwen3.5-35B-A3B",
        tensors=qwen3_5,
        billions=36.0,
        layers=4,
        tiny={
            "text_config": {"head_dim": 16, "rope_parameters": {"mrope_section": [1, 1, 0]}},
            "vision_config": TINY_VISION,
            **IMAGE_IDS,
        },
    ),
)
