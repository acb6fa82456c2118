"""GLM-4.5V and Kimi-K2.5: text models of GLM-4.5 and of DeepSeek-V3 with a vision tower."""

from published.checkpoint import Checkpoint
from published.collector import Config, Tensors
from published.deepseek import packed_experts
from published.glm import glm4_moe


def glm4v_moe(t: Tensors, config: Config) -> None:
    """GLM-4.5V."""
    # Its layer for a second token is not published.
    glm4_moe(t, config["text_config"] | {"num_nextn_predict_layers": 0}, "model.language_model.")
    _glm_tower(t, "model.visual", config["vision_config"])


def _glm_tower(t: Tensors, name: str, config: Config) -> None:
    hidden, out, patch = config["hidden_size"], config["out_hidden_size"], config["patch_size"]
    merge = config["spatial_merge_size"]
    t.add(f"{name}.embeddings.position_embedding.weight", (config["image_size"] // patch) ** 2, hidden)
    t.add(f"{name}.patch_embed.proj.weight", hidden, 3, config["temporal_patch_size"], patch, patch)
    t.add(f"{name}.patch_embed.proj.bias", hidden)
    t.norms(name, ("post_conv_layernorm", "post_layernorm"), hidden)
    for block in range(config["depth"]):
        p = f"{name}.blocks.{block}"
        t.norms(p, ("norm1", "norm2"), hidden)
        t.linear(f"{p}.attn.qkv", 3 * hidden, hidden)
        t.linear(f"{p}.attn.proj", hidden, hidden)
        t.mlp(f"{p}.mlp", hidden, out)
    t.add(f"{name}.downsample.weight", out, hidden, merge, merge)
    t.add(f"{name}.downsample.bias", out)
    t.linear(f"{name}.merger.proj", out, out)
    t.norm(f"{name}.merger.post_projection_norm", out, bias=True)
    t.mlp(f"{name}.merger", out, config["intermediate_size"])


def kimi_k25(t: Tensors, config: Config) -> None:
    """Kimi-K2.5: the packed experts of Kimi-K2-Thinking."""
    packed_experts(t, config["text_config"], "language_model.model.", head="language_model.lm_head")
    vision = config["vision_config"]
    hidden, inner, name = vision["vt_hidden_size"], vision["vt_intermediate_size"], "vision_tower"
    height, width = vision["init_pos_emb_height"], vision["init_pos_emb_width"]
    t.add(f"{name}.patch_embed.proj.weight", hidden, 3, vision["patch_size"], vision["patch_size"])
    t.add(f"{name}.patch_embed.proj.bias", hidden)
    t.add(f"{name}.patch_embed.pos_emb.weight", height, width, hidden)
    for block in range(vision["vt_num_hidden_layers"]):
        p = f"{name}.encoder.blocks.{block}"
        t.norms(p, ("norm0", "norm1"), hidden, bias=True)
        t.linear(f"{p}.wqkv", 3 * hidden, hidden, bias=True)
        t.linear(f"{p}.wo", hidden, hidden, bias=True)
        t.linear(f"{p}.mlp.fc0", inner, hidden, bias=True)
        t.linear(f"{p}.mlp.fc1", hidden, inner, bias=True)
    t.norm(f"{name}.encoder.final_layernorm", hidden, bias=True)
    high, wide = vision["merge_kernel_size"]
    t.norm("mm_projector.pre_norm", hidden, bias=True)
    t.linear("mm_projector.proj.0", high * wide * hidden, high * wide * hidden, bias=True)
    t.linear("mm_projector.proj.2", config["text_config"]["hidden_size"], high * wide * hidden, bias=True)


CHECKPOINTS = (
    Checkpoint(
        repo="zai-org/GLM-4.5V",
        tensors=glm4v_moe,
        billions=107.7,
        tiny={
            "image_end_token_id": 61,
            "image_start_token_id": 62,
            "image_token_id": 63,
            "video_end_token_id": 64,
            "video_start_token_id": 65,
            "video_token_id": 66,
            "text_config": {"rope_scaling": {"mrope_section": [1, 1, 0]}},
            "vision_config": {
                "depth": 3,
                "hidden_size": 16,
                "image_size": 16,
                "intermediate_size": 20,
                "num_heads": 2,
                "out_hidden_size": 40,
                "patch_size": 4,
            },
        },
    ),
    Checkpoint(
        repo="moonshotai/Kimi-K2.5",
        tensors=kimi_k25,
        billions=1026.9,
        tiny={
            "media_placeholder_token_id": 61,
            "text_config": {"hidden_size": 64, "moe_intermediate_size": 32, "num_key_value_heads": 4},
            "vision_config": {
                "init_pos_emb_height": 4,
                "init_pos_emb_width": 4,
                "mm_hidden_size": 16,
                "patch_size": 4,
                "text_hidden_size": 64,
                "vt_hidden_size": 16,
                "vt_intermediate_size": 20,
                "vt_num_attention_heads": 2,
                "vt_num_hidden_layers": 3,
                # The names that transformers has for them, whose defaults are the published sizes.
                "hidden_size": 16,
                "intermediate_size": 20,
                "num_attention_heads": 2,
                "num_hidden_layers": 3,
                "pos_emb_height": 4,
                "pos_emb_width": 4,
            },
            "projection_hidden_size": 16,
        },
    ),
)
