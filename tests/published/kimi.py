"""Kimi-Linear."""

from published.checkpoint import Checkpoint
from published.collector import MIXTRAL_GATED, NORMS, Config, Tensors, embeddings, latent_attention


def kimi_linear(t: Tensors, config: Config) -> None:
    """Kimi-Linear: latent attention in some layers, delta attention in the others, experts under Mixtral's names."""
    hidden, experts, inner = config["hidden_size"], config["num_experts"], config["moe_intermediate_size"]
    embeddings(t, config)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        t.norms(p, NORMS, hidden)
        if layer + 1 in config["linear_attn_config"]["full_attn_layers"]:
            latent_attention(t, f"{p}.self_attn", config)
        else:
            _delta_attention(t, f"{p}.self_attn", config)
        if layer < config["first_k_dense_replace"]:
            t.mlp(f"{p}.mlp", hidden, config["intermediate_size"])
            continue
        block = f"{p}.block_sparse_moe"
        t.linear(f"{block}.gate", experts, hidden)
        t.add(f"{block}.gate.e_score_correction_bias", experts, dtype="F32")
        t.experts(f"{block}.experts", experts, hidden, inner, MIXTRAL_GATED)
        t.mlp(f"{block}.shared_experts", hidden, inner * config["num_shared_experts"])


def _delta_attention(t: Tensors, name: str, config: Config) -> None:
    hidden, linear = config["hidden_size"], config["linear_attn_config"]
    heads, size = linear["num_heads"], linear["head_dim"]
    width = heads * size
    t.add(f"{name}.A_log", 1, 1, heads, 1, dtype="F32")
    t.add(f"{name}.dt_bias", width, dtype="F32")
    for projection in ("q", "k", "v"):
        t.linear(f"{name}.{projection}_proj", width, hidden)
        t.add(f"{name}.{projection}_conv1d.weight", width, 1, linear["short_conv_kernel_size"])
    t.linear(f"{name}.b_proj", heads, hidden)
    for gate in ("f", "g"):
        t.linear(f"{name}.{gate}_a_proj", size, hidden)
        t.linear(f"{name}.{gate}_b_proj", width, size)
    t.norm(f"{name}.o_norm", size)
    t.linear(f"{name}.o_proj", hidden, width)


CHECKPOINTS = (
    Checkpoint(
        repo="moonshotai/Kimi-Linear-48B-A3B-Instruct",
        tensors=kimi_linear,
        billions=49.1,
        layers=4,
        tiny={"num_key_value_heads": 4, "linear_attn_config": {"num_heads": 4}},
    ),
)
