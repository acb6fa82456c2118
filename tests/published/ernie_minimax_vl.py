"""ERNIE 4.5 VL, which has experts for text and experts for images, and MiniMax-M3."""

from published.checkpoint import Checkpoint
from published.collector import MIXTRAL_GATED, NORMS, Config, Tensors, attention, embeddings, head_dim


def ernie4_5_vl(t: Tensors, config: Config) -> None:
    """ERNIE 4.5 VL: as many experts for images as for text, but smaller, with a router of their own."""
    text = config["text_config"]
    hidden, experts = text["hidden_size"], text["moe_num_experts"]
    text_inner, image_inner = text["moe_intermediate_size"]
    embeddings(t, text)
    for layer, kind in enumerate(text["mlp_layer_types"]):
        p = f"model.layers.{layer}"
        t.norms(p, NORMS, hidden)
        attention(t, f"{p}.self_attn", text)
        if kind == "dense":
            t.mlp(f"{p}.mlp", hidden, text["intermediate_size"])
            continue
        t.add(f"{p}.mlp.gate.weight", hidden, experts, dtype="F32")
        t.add(f"{p}.mlp.gate.weight_1", hidden, experts, dtype="F32")
        t.add(f"{p}.mlp.moe_statics.e_score_correction_bias", 2, experts, dtype="F32")
        for expert in range(2 * experts):
            t.mlp(f"{p}.mlp.experts.{expert}", hidden, text_inner if expert < experts else image_inner)
        t.mlp(f"{p}.mlp.shared_experts", hidden, text_inner * text["moe_num_shared_experts"])
    _ernie_tower(t, "vision_model", config["vision_config"])
    _resampler(t, "model.resampler_model", config)


def _ernie_tower(t: Tensors, name: str, config: Config) -> None:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    t.linear(f"{name}.patch_embed.proj", hidden, config["in_channels"] * config["patch_size"] ** 2)
    t.norm(f"{name}.ln", hidden, bias=True)
    for block in range(config["depth"]):
        p = f"{name}.blocks.{block}"
        t.norms(p, ("norm1", "norm2"), hidden, bias=True)
        t.linear(f"{p}.attn.qkv", 3 * hidden, hidden, bias=True)
        t.linear(f"{p}.attn.proj", hidden, hidden, bias=True)
        t.linear(f"{p}.mlp.fc1", inner, hidden, bias=True)
        t.linear(f"{p}.mlp.fc2", hidden, inner, bias=True)


def _resampler(t: Tensors, name: str, config: Config) -> None:
    vision = config["vision_config"]
    width = vision["hidden_size"] * vision["spatial_merge_size"] ** 2
    for part, columns in (("spatial_linear", width), ("temporal_linear", width * vision["temporal_merge_size"])):
        t.linear(f"{name}.{part}.0", width, columns, bias=True)
        t.linear(f"{name}.{part}.2", width, width, bias=True)
        t.norm(f"{name}.{part}.3", width, bias=True)
    t.linear(f"{name}.mlp", config["text_config"]["hidden_size"], width, bias=True)
    t.norm(f"{name}.after_norm", config["text_config"]["hidden_size"])


def minimax_m3(t: Tensors, config: Config) -> None:
    """MiniMax-M3: the experts of Mixtral, dense layers first, attention to some blocks only after those."""
    text = config["text_config"]
    hidden, experts, inner = text["hidden_size"], text["num_local_experts"], text["intermediate_size"]
    embeddings(t, text, "language_model.model.", head="language_model.lm_head")
    sparse = text["sparse_attention_config"]
    for layer, is_moe in enumerate(text["moe_layer_freq"]):
        p = f"language_model.model.layers.{layer}"
        t.norms(p, NORMS, hidden)
        attention(t, f"{p}.self_attn", text)
        t.norms(f"{p}.self_attn", ("q_norm", "k_norm"), head_dim(text))
        if sparse["sparse_attention_freq"][layer]:
            size = text["index_head_dim"]
            t.linear(f"{p}.self_attn.index_q_proj", text["index_n_heads"] * size, hidden)
            t.linear(f"{p}.self_attn.index_k_proj", size, hidden)
            t.norms(f"{p}.self_attn", ("index_q_norm", "index_k_norm"), size)
        if not is_moe:
            t.mlp(f"{p}.mlp", hidden, text["dense_intermediate_size"])
            continue
        block = f"{p}.block_sparse_moe"
        t.linear(f"{block}.gate", experts, hidden)
        t.add(f"{block}.e_score_correction_bias", experts, dtype="F32")
        t.experts(f"{block}.experts", experts, hidden, inner, MIXTRAL_GATED)
        t.mlp(f"{block}.shared_experts", hidden, text["shared_intermediate_size"])
    _minimax_tower(t, config)


def _minimax_tower(t: Tensors, config: Config) -> None:
    vision, name = config["vision_config"], "vision_tower.vision_model"
    hidden, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    t.add(f"{name}.embeddings.patch_embedding.weight", hidden, 3, vision["temporal_patch_size"], patch, patch)
    t.norm(f"{name}.pre_layrnorm", hidden, bias=True)
    for layer in range(vision["num_hidden_layers"]):
        p = f"{name}.encoder.layers.{layer}"
        t.norms(p, ("layer_norm1", "layer_norm2"), hidden, bias=True)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            t.linear(f"{p}.self_attn.{projection}", hidden, hidden, bias=True)
        t.linear(f"{p}.mlp.fc1", inner, hidden, bias=True)
        t.linear(f"{p}.mlp.fc2", hidden, inner, bias=True)
    out, merged = config["text_config"]["hidden_size"], config["projector_hidden_size"]
    t.linear("multi_modal_projector.linear_1", merged, hidden, bias=True)
    t.linear("multi_modal_projector.linear_2", out, merged, bias=True)
    t.linear("patch_merge_mlp.linear_1", merged, out * vision["spatial_merge_size"] ** 2, bias=True)
    t.linear("patch_merge_mlp.linear_2", out, merged, bias=True)


IMAGE_IDS = {
    "image_end_token_id": 61,
    "image_start_token_id": 62,
    "image_token_id": 63,
    "video_end_token_id": 64,
    "video_start_token_id": 65,
    "video_token_id": 66,
}

CHECKPOINTS = (
    Checkpoint(
        repo="baidu/ERNIE-4.5-VL-28B-A3B-PT",
        tensors=ernie4_5_vl,
        billions=29.4,
        tiny={
            **IMAGE_IDS,
            "text_config": {"moe_intermediate_size": [24, 16], "rope_scaling": {"mrope_section": [2, 2, 1]}},
            "vision_config": {"depth": 3, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "patch_size": 4},
        },
    ),
    Checkpoint(
        repo="MiniMaxAI/MiniMax-M3",
        tensors=minimax_m3,
        billions=428.0,
        tiny={
            "image_token_index": 61,
            "projector_hidden_size": 28,
            "video_token_index": 62,
            "text_config": {
                "dense_intermediate_size": 44,
                "index_block_size": 8,
                "index_topk_blocks": 2,
                "intermediate_size": 24,
                "moe_layer_freq": [0, 1],
                "rotary_dim": 4,
                "shared_intermediate_size": 24,
                "sparse_attention_config": {"sparse_attention_freq": [0, 1]},
            },
            "vision_config": {
                "hidden_size": 24,
                "image_size": 16,
                "intermediate_size": 20,
                "num_attention_heads": 2,
                "num_hidden_layers": 3,
                "patch_size": 4,
            },
        },
    ),
)
