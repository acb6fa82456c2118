"""Gemma 4."""

from published.checkpoint import Checkpoint
from published.collector import Config, Tensors

TEXT = "model.language_model"
NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
EXPERT_NORMS = ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2")


def gemma4(t: Tensors, config: Config) -> None:
    """Gemma 4 with experts: a dense block next to them, wider heads without values of their own in full attention."""
    text = config["text_config"]
    hidden, experts, inner = text["hidden_size"], text["num_experts"], text["moe_intermediate_size"]
    t.add(f"{TEXT}.embed_tokens.weight", text["vocab_size"], hidden)
    t.norm(f"{TEXT}.norm", hidden)
    for layer, kind in enumerate(text["layer_types"]):
        p = f"{TEXT}.layers.{layer}"
        t.norms(p, (*NORMS, *EXPERT_NORMS), hidden)
        t.add(f"{p}.layer_scalar", 1)
        _attention(t, f"{p}.self_attn", text, is_full=kind == "full_attention")
        t.mlp(f"{p}.mlp", hidden, text["intermediate_size"])
        t.linear(f"{p}.router.proj", experts, hidden)
        t.add(f"{p}.router.scale", hidden)
        t.add(f"{p}.router.per_expert_scale", experts)
        t.add(f"{p}.experts.gate_up_proj", experts, 2 * inner, hidden)
        t.add(f"{p}.experts.down_proj", experts, hidden, inner)
    vision = config["vision_config"]
    _vision_tower(t, "model.vision_tower", vision)
    t.linear("model.embed_vision.embedding_projection", hidden, vision["hidden_size"])


def _attention(t: Tensors, name: str, config: Config, *, is_full: bool) -> None:
    hidden = config["hidden_size"]
    size = config["global_head_dim"] if is_full else config["head_dim"]
    keys = size * config["num_global_key_value_heads" if is_full else "num_key_value_heads"]
    queries = size * config["num_attention_heads"]
    t.linear(f"{name}.q_proj", queries, hidden)
    t.linear(f"{name}.k_proj", keys, hidden)
    if not is_full:
        t.linear(f"{name}.v_proj", keys, hidden)
    t.linear(f"{name}.o_proj", hidden, queries)
    t.norms(name, ("q_norm", "k_norm"), size)


def _vision_tower(t: Tensors, name: str, config: Config) -> None:
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    t.add(f"{name}.patch_embedder.position_embedding_table", 2, config["position_embedding_size"], hidden)
    t.linear(f"{name}.patch_embedder.input_proj", hidden, 3 * config["patch_size"] ** 2)
    t.add(f"{name}.std_bias", hidden)
    t.add(f"{name}.std_scale", hidden)
    width = config["num_attention_heads"] * size
    for layer in range(config["num_hidden_layers"]):
        p = f"{name}.encoder.layers.{layer}"
        t.norms(p, NORMS, hidden)
        for projection in ("q", "k", "v"):
            t.linear(f"{p}.self_attn.{projection}_proj.linear", width, hidden)
        t.linear(f"{p}.self_attn.o_proj.linear", hidden, width)
        t.norms(f"{p}.self_attn", ("q_norm", "k_norm"), size)
        t.mlp(f"{p}.mlp", hidden, inner, ("gate_proj.linear", "up_proj.linear", "down_proj.linear"))


CHECKPOINTS = (
    Checkpoint(
        repo="google/gemma-4-26B-A4B-it",
        tensors=gemma4,
        billions=25.8,
        layers=6,
        tiny={
            "audio_token_id": 61,
            "boa_token_id": 62,
            "boi_token_id": 63,
            "eoa_token_id": 64,
            "eoi_token_id": 65,
            "image_token_id": 66,
            "video_token_id": 67,
            "text_config": {"global_head_dim": 16, "num_global_key_value_heads": 1, "top_k_experts": 2},
            "vision_config": {
                "head_dim": 4,
                "hidden_size": 16,
                "intermediate_size": 20,
                "num_attention_heads": 4,
                "num_hidden_layers": 3,
                "num_key_value_heads": 4,
                "patch_size": 4,
                "position_embedding_size": 16,
            },
        },
    ),
)
