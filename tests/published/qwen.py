"""Qwen of text alone: Qwen1.5-MoE to Qwen3-Next, and OLMoE, which has the same names."""

from published.checkpoint import Checkpoint
from published.collector import NORMS, Config, Fp8, Tensors, attention, embeddings, head_dim


def sparse_block(t: Tensors, name: str, config: Config) -> None:
    """A router, experts stored one by one and, where the config gives its size, a shared expert with its gate."""
    hidden, experts = config["hidden_size"], config["num_experts"]
    t.linear(f"{name}.gate", experts, hidden, is_quantized=False)
    t.experts(f"{name}.experts", experts, hidden, config.get("moe_intermediate_size") or config["intermediate_size"])
    shared_expert(t, name, config)


def shared_expert(t: Tensors, name: str, config: Config) -> None:
    """A shared expert with its gate, where the config gives its size."""
    if shared := config.get("shared_expert_intermediate_size"):
        t.mlp(f"{name}.shared_expert", config["hidden_size"], shared)
        t.add(f"{name}.shared_expert_gate.weight", 1, config["hidden_size"])


def qk_norms(t: Tensors, name: str, size: int) -> None:
    """Norms of queries and keys."""
    t.norm(f"{name}.q_norm", size)
    t.norm(f"{name}.k_norm", size)


def qwen2_moe(t: Tensors, config: Config) -> None:
    """Qwen1.5-MoE and Qwen2: biases in attention, a shared expert."""
    embeddings(t, config)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        t.norms(p, NORMS, config["hidden_size"])
        attention(t, f"{p}.self_attn", config, bias=True)
        sparse_block(t, f"{p}.mlp", config)


def qwen3_moe(t: Tensors, config: Config) -> None:
    """Qwen3: norms of queries and keys, no shared expert."""
    embeddings(t, config)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        t.norms(p, NORMS, config["hidden_size"])
        attention(t, f"{p}.self_attn", config)
        qk_norms(t, f"{p}.self_attn", head_dim(config))
        sparse_block(t, f"{p}.mlp", config)


def olmoe(t: Tensors, config: Config) -> None:
    """OLMoE: norms over all heads of queries and of keys at once."""
    embeddings(t, config)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        t.norms(p, NORMS, config["hidden_size"])
        attention(t, f"{p}.self_attn", config)
        t.norm(f"{p}.self_attn.q_norm", config["num_attention_heads"] * head_dim(config))
        t.norm(f"{p}.self_attn.k_norm", config["num_key_value_heads"] * head_dim(config))
        sparse_block(t, f"{p}.mlp", config)


def delta_sizes(config: Config) -> tuple[int, int, int]:
    """Widths of keys and values of linear attention, and its number of value heads."""
    values = config["linear_num_value_heads"]
    keys_width = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    return keys_width, values * config["linear_value_head_dim"], values


def is_full(config: Config, layer: int) -> bool:
    """Whether a layer has full attention; the others have linear attention."""
    return (layer + 1) % config["full_attention_interval"] == 0


def gated_attention(t: Tensors, name: str, config: Config) -> None:
    """Full attention whose query projection also computes a gate of the output."""
    attention(t, name, config, gated=2)
    qk_norms(t, name, head_dim(config))


def multi_token_prediction(t: Tensors, config: Config) -> None:
    """What stands around the layer that predicts a second token."""
    hidden = config["hidden_size"]
    t.linear("mtp.fc", hidden, 2 * hidden)
    t.norms("mtp", ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"), hidden)


def qwen3_next(t: Tensors, config: Config) -> None:
    """Qwen3-Next: three layers of linear attention, then one of full attention; one layer more for a second token."""
    embeddings(t, config)
    layers = [(f"model.layers.{layer}", is_full(config, layer)) for layer in range(config["num_hidden_layers"])]
    for p, full in [*layers, ("mtp.layers.0", True)]:
        t.norms(p, NORMS, config["hidden_size"])
        if full:
            gated_attention(t, f"{p}.self_attn", config)
        else:
            _linear_attention(t, f"{p}.linear_attn", config)
        sparse_block(t, f"{p}.mlp", config)
    multi_token_prediction(t, config)


def _linear_attention(t: Tensors, name: str, config: Config) -> None:
    hidden = config["hidden_size"]
    keys, values, heads = delta_sizes(config)
    t.add(f"{name}.A_log", heads)
    t.add(f"{name}.dt_bias", heads)
    t.add(f"{name}.conv1d.weight", 2 * keys + values, 1, config["linear_conv_kernel_dim"])
    t.linear(f"{name}.in_proj_qkvz", 2 * keys + 2 * values, hidden)
    t.linear(f"{name}.in_proj_ba", 2 * heads, hidden)
    t.norm(f"{name}.norm", config["linear_value_head_dim"])
    t.linear(f"{name}.out_proj", hidden, values)


CHECKPOINTS = (
    Checkpoint(repo="Qwen/Qwen1.5-MoE-A2.7B", tensors=qwen2_moe, billions=14.3),
    Checkpoint(repo="Qwen/Qwen2-57B-A14B", tensors=qwen2_moe, billions=57.4),
    Checkpoint(repo="Qwen/Qwen3-30B-A3B", tensors=qwen3_moe, billions=30.5),
    Checkpoint(
        repo="Qwen/Qwen3-30B-A3B-FP8",
        tensors=qwen3_moe,
        billions=30.5,
        fp8=Fp8(scales="BF16"),
        tiny={"hidden_size": 136, "moe_intermediate_size": 144},
    ),
    Checkpoint(repo="Qwen/Qwen3-235B-A22B", tensors=qwen3_moe, billions=235.1),
    Checkpoint(repo="Qwen/Qwen3-Coder-480B-A35B-Instruct", tensors=qwen3_moe, billions=480.2),
    Checkpoint(repo="Qwen/Qwen3-Next-80B-A3B-Instruct", tensors=qwen3_next, billions=81.3, layers=4),
    Checkpoint(repo="allenai/OLMoE-1B-7B-0924", tensors=olmoe, billions=6.92),
)
