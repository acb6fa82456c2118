"""Mistral Small 4 and Aria: models of the LLaVA kind, whose language model lies below ``language_model.``."""

from published.checkpoint import Checkpoint
from published.collector import NORMS, Config, Fp8, Tensors, attention, embeddings, latent_attention

TEXT = "language_model.model."
HEAD = "language_model.lm_head"


def mistral4(t: Tensors, config: Config) -> None:
    """Mistral Small 4: FP8 with one scale per matrix or expert, and another for its inputs."""
    text = config["text_config"]
    hidden, experts, inner = text["hidden_size"], text["n_routed_experts"], text["moe_intermediate_size"]
    embeddings(t, text, TEXT, head=HEAD)
    for layer in range(text["num_hidden_layers"]):
        p = f"{TEXT}layers.{layer}"
        t.norms(p, NORMS, hidden)
        latent_attention(t, f"{p}.self_attn", text)
        t.linear(f"{p}.mlp.gate", experts, hidden, is_quantized=False)
        for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            projection = f"{p}.mlp.experts.{name}"
            t.add(projection, experts, rows, columns, dtype="F8_E4M3")
            t.add(f"{projection}_scale_inv", experts, 1, 1)
            t.add(f"{projection}_activation_scale", experts)
        t.mlp(f"{p}.mlp.shared_experts", hidden, inner * text["n_shared_experts"])
    plain = Tensors()
    _pixtral(plain, "vision_tower", config["vision_config"])
    _projector(plain, "multi_modal_projector", config)
    t.items |= plain.items


def _pixtral(t: Tensors, name: str, config: Config) -> None:
    hidden, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    t.norm(f"{name}.ln_pre", hidden)
    t.add(f"{name}.patch_conv.weight", hidden, config["num_channels"], patch, patch)
    for layer in range(config["num_hidden_layers"]):
        p = f"{name}.transformer.layers.{layer}"
        t.norms(p, ("attention_norm", "ffn_norm"), hidden)
        for projection in ("q", "k", "v", "o"):
            t.linear(f"{p}.attention.{projection}_proj", hidden, hidden)
        t.mlp(f"{p}.feed_forward", hidden, inner)


def _projector(t: Tensors, name: str, config: Config) -> None:
    hidden, vision = config["text_config"]["hidden_size"], config["vision_config"]["hidden_size"]
    t.norm(f"{name}.norm", vision)
    t.linear(f"{name}.patch_merger.merging_layer", vision, vision * config["spatial_merge_size"] ** 2)
    t.linear(f"{name}.linear_1", hidden, vision)
    t.linear(f"{name}.linear_2", hidden, hidden)


def aria(t: Tensors, config: Config) -> None:
    """Aria: experts under the names of linear layers, input dimension first."""
    text = config["text_config"]
    hidden, experts, inner = text["hidden_size"], text["moe_num_experts"], text["intermediate_size"]
    embeddings(t, text, TEXT, head=HEAD)
    for layer in range(text["num_hidden_layers"]):
        p = f"{TEXT}layers.{layer}"
        t.norms(p, NORMS, hidden)
        attention(t, f"{p}.self_attn", text)
        t.linear(f"{p}.mlp.router", experts, hidden)
        t.add(f"{p}.mlp.experts.fc1.weight", experts, hidden, 2 * inner)
        t.add(f"{p}.mlp.experts.fc2.weight", experts, inner, hidden)
        t.mlp(f"{p}.mlp.shared_experts", hidden, inner * text["moe_num_shared_experts"])
    vision = config["vision_config"]
    _idefics3(t, "vision_tower", vision)
    _aria_projector(t, "multi_modal_projector", config)


def _idefics3(t: Tensors, name: str, config: Config) -> None:
    hidden, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    t.add(f"{name}.embeddings.patch_embedding.weight", hidden, 3, patch, patch)
    t.add(f"{name}.embeddings.patch_embedding.bias", hidden)
    t.add(f"{name}.embeddings.position_embedding.weight", (config["image_size"] // patch) ** 2, hidden)
    t.norm(f"{name}.post_layernorm", hidden, bias=True)
    for layer in range(config["num_hidden_layers"]):
        p = f"{name}.encoder.layers.{layer}"
        t.norms(p, ("layer_norm1", "layer_norm2"), hidden, bias=True)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            t.linear(f"{p}.self_attn.{projection}", hidden, hidden, bias=True)
        t.linear(f"{p}.mlp.fc1", inner, hidden, bias=True)
        t.linear(f"{p}.mlp.fc2", hidden, inner, bias=True)


def _aria_projector(t: Tensors, name: str, config: Config) -> None:
    hidden, vision = config["text_config"]["hidden_size"], config["vision_config"]["hidden_size"]
    cross = f"{name}.cross_attn"
    t.add(f"{name}.query", max(config["projector_patch_to_query_dict"].values()), vision)
    t.norm(f"{name}.layer_norm", vision, bias=True)
    t.norms(cross, ("layer_norm", "layer_norm_kv"), vision, bias=True)
    for projection in ("q_proj", "k_proj", "v_proj"):
        t.linear(f"{cross}.{projection}", vision, vision)
    t.linear(f"{cross}.linear", vision, vision, bias=True)
    t.add(f"{cross}.multihead_attn.in_proj_weight", 3 * vision, vision)
    t.add(f"{cross}.multihead_attn.in_proj_bias", 3 * vision)
    t.linear(f"{cross}.multihead_attn.out_proj", vision, vision, bias=True)
    t.linear(f"{name}.feed_forward.linear_in", hidden, vision)
    t.linear(f"{name}.feed_forward.linear_out", hidden, hidden)


TINY_VISION = {
    "hidden_size": 16,
    "image_size": 16,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "patch_size": 4,
}

CHECKPOINTS = (
    Checkpoint(
        repo="mistralai/Mistral-Small-4-119B-2603",
        tensors=mistral4,
        billions=119.4,
        fp8=Fp8(scales="BF16", block=None),
        tiny={
            "image_token_index": 61,
            "text_config": {"num_key_value_heads": 4},
            "vision_config": TINY_VISION | {"head_dim": 8},
        },
    ),
    Checkpoint(
        repo="rhymes-ai/Aria",
        tensors=aria,
        billions=25.3,
        tiny={
            "image_token_index": 61,
            "projector_patch_to_query_dict": {"16": 4},
            "text_config": {"intermediate_size": 24, "moe_topk": 2, "num_key_value_heads": 4},
            "vision_config": TINY_VISION,
        },
    ),
)
