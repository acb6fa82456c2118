"""Llama 4."""

from typing import Any

from published.checkpoint import Checkpoint
from published.collector import NORMS, Config, Tensors, attention, embeddings

TEXT = "language_model.model."


def llama4(t: Tensors, config: Config) -> None:
    """Llama 4: the language model below ``language_model.``, experts in one tensor, a vision model next to it."""
    text = config["text_config"]
    hidden, experts, inner = text["hidden_size"], text["num_local_experts"], text["intermediate_size"]
    embeddings(t, text, TEXT, head="language_model.lm_head")
    for layer in range(text["num_hidden_layers"]):
        p = f"{TEXT}layers.{layer}"
        t.norms(p, NORMS, hidden)
        attention(t, f"{p}.self_attn", text)
        if (layer + 1) % text["interleave_moe_layer_step"]:
            t.mlp(f"{p}.feed_forward", hidden, text["intermediate_size_mlp"])
            continue
        t.linear(f"{p}.feed_forward.router", experts, hidden)
        t.add(f"{p}.feed_forward.experts.gate_up_proj", experts, hidden, 2 * inner)
        t.add(f"{p}.feed_forward.experts.down_proj", experts, inner, hidden)
        t.mlp(f"{p}.feed_forward.shared_expert", hidden, inner)
    vision = config["vision_config"]
    t.linear("multi_modal_projector.linear_1", hidden, vision["vision_output_dim"])
    _vision_model(t, "vision_model", vision)


def _vision_model(t: Tensors, name: str, config: Config) -> None:
    hidden, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    patches = (config["image_size"] // patch) ** 2 + 1
    t.add(f"{name}.class_embedding", hidden)
    t.add(f"{name}.positional_embedding_vlm", patches, hidden)
    t.add(f"{name}.patch_embedding.linear.weight", hidden, config["num_channels"] * patch**2)
    t.norms(name, ("layernorm_pre", "layernorm_post"), hidden, bias=True)
    heads = config | {"num_key_value_heads": config["num_attention_heads"]}
    for layer in range(config["num_hidden_layers"]):
        p = f"{name}.model.layers.{layer}"
        t.norms(p, NORMS, hidden, bias=True)
        attention(t, f"{p}.self_attn", heads, bias=True, o_bias=True)
        t.linear(f"{p}.mlp.fc1", inner, hidden, bias=True)
        t.linear(f"{p}.mlp.fc2", hidden, inner, bias=True)
    shuffled = int(hidden / config["pixel_shuffle_ratio"] ** 2)
    t.linear(f"{name}.vision_adapter.mlp.fc1", config["projector_input_dim"], shuffled)
    t.linear(f"{name}.vision_adapter.mlp.fc2", config["projector_output_dim"], config["projector_input_dim"])


TINY_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "image_size": 16,
    # Pixel shuffling puts four patches together.
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "patch_size": 4,
    "projector_input_dim": 24,
    "projector_output_dim": 24,
    "vision_output_dim": 24,
}

CHECKPOINTS = (
    Checkpoint(
        repo="meta-llama/Llama-4-Scout-17B-16E-Instruct",
        tensors=llama4,
        billions=108.6,
        layers=4,
        tiny={
            "boi_token_index": 61,
            "eoi_token_index": 62,
            "image_token_index": 63,
            "text_config": {"attention_chunk_size": 16, "intermediate_size_mlp": 44, "num_experts_per_tok": 1},
            "vision_config": TINY_VISION,
        },
    ),
)
