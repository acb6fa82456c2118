"""Models that mix attention with state-space or convolution layers: Granite 4, Jamba, Nemotron 3, LFM2."""

from published.checkpoint import Checkpoint
from published.collector import MIXTRAL_GATED, NORMS, Config, Tensors, attention, embeddings, head_dim


def granitemoe(t: Tensors, config: Config) -> None:
    """Granite 3: experts in two tensors of the names of linear layers."""
    embeddings(t, config)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        t.norms(p, NORMS, config["hidden_size"])
        attention(t, f"{p}.self_attn", config)
        _granite_experts(t, f"{p}.block_sparse_moe", config)


def _granite_experts(t: Tensors, name: str, config: Config) -> None:
    hidden, experts, inner = config["hidden_size"], config["num_local_experts"], config["intermediate_size"]
    t.add(f"{name}.router.layer.weight", experts, hidden)
    t.add(f"{name}.input_linear.weight", experts, 2 * inner, hidden)
    t.add(f"{name}.output_linear.weight", experts, hidden, inner)


def granitemoehybrid(t: Tensors, config: Config) -> None:
    """Granite 4: Mamba 2 in most layers, a shared block next to the experts in all."""
    hidden, shared = config["hidden_size"], config["shared_intermediate_size"]
    embeddings(t, config)
    for layer, kind in enumerate(config["layer_types"]):
        p = f"model.layers.{layer}"
        t.norms(p, NORMS, hidden)
        if kind == "attention":
            attention(t, f"{p}.self_attn", config)
        else:
            heads, state = config["mamba_n_heads"], config["mamba_n_groups"] * config["mamba_d_state"]
            _mamba2(t, f"{p}.mamba", hidden, (heads, config["mamba_d_head"]), state, config["mamba_d_conv"])
        _granite_experts(t, f"{p}.block_sparse_moe", config)
        t.linear(f"{p}.shared_mlp.input_linear", 2 * shared, hidden)
        t.linear(f"{p}.shared_mlp.output_linear", hidden, shared)


def _mamba2(t: Tensors, name: str, hidden: int, heads: tuple[int, int], state: int, kernel: int) -> None:
    """Mamba 2.

    Args:
        t: Where to.
        name: Of the mixer.
        hidden: Width of the model.
        heads: Their number, and the size of each.
        state: Numbers of the state, in all groups together.
        kernel: Positions that the convolution sees.
    """
    count, size = heads
    width = count * size
    for vector in ("A_log", "D", "dt_bias"):
        t.add(f"{name}.{vector}", count)
    t.add(f"{name}.conv1d.weight", width + 2 * state, 1, kernel)
    t.add(f"{name}.conv1d.bias", width + 2 * state)
    t.linear(f"{name}.in_proj", 2 * width + 2 * state + count, hidden)
    t.norm(f"{name}.norm", width)
    t.linear(f"{name}.out_proj", hidden, width)


def jamba(t: Tensors, config: Config) -> None:
    """Jamba: attention in one layer of eight, experts in every second one."""
    hidden, experts, inner = config["hidden_size"], config["num_experts"], config["intermediate_size"]
    t.add("model.embed_tokens.weight", config["vocab_size"], hidden)
    t.norm("model.final_layernorm", hidden)
    t.add("lm_head.weight", config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        t.norms(p, ("input_layernorm", "pre_ff_layernorm"), hidden)
        if layer % config["attn_layer_period"] == config["attn_layer_offset"]:
            attention(t, f"{p}.self_attn", config)
        else:
            _mamba1(t, f"{p}.mamba", config)
        if layer % config["expert_layer_period"] == config["expert_layer_offset"]:
            t.linear(f"{p}.feed_forward.router", experts, hidden)
            t.experts(f"{p}.feed_forward.experts", experts, hidden, inner)
        else:
            t.mlp(f"{p}.feed_forward", hidden, inner)


def _mamba1(t: Tensors, name: str, config: Config) -> None:
    hidden, state, rank = config["hidden_size"], config["mamba_d_state"], config["mamba_dt_rank"]
    width = config["mamba_expand"] * hidden
    t.add(f"{name}.A_log", width, state)
    t.add(f"{name}.D", width)
    t.add(f"{name}.conv1d.weight", width, 1, config["mamba_d_conv"])
    t.add(f"{name}.conv1d.bias", width)
    t.linear(f"{name}.in_proj", 2 * width, hidden)
    t.linear(f"{name}.x_proj", rank + 2 * state, width)
    t.linear(f"{name}.dt_proj", width, rank, bias=True)
    t.linear(f"{name}.out_proj", hidden, width)
    t.norm(f"{name}.dt_layernorm", rank)
    t.norms(name, ("b_layernorm", "c_layernorm"), state)


def nemotron_h(t: Tensors, config: Config) -> None:
    """Nemotron 3: one mixer in each layer, below ``backbone.``; experts without a gate."""
    hidden, experts = config["hidden_size"], config["n_routed_experts"]
    t.add("backbone.embeddings.weight", config["vocab_size"], hidden)
    t.norm("backbone.norm_f", hidden)
    t.add("lm_head.weight", config["vocab_size"], hidden)
    gateless = ("", "up_proj", "down_proj")
    for layer, kind in enumerate(config["hybrid_override_pattern"]):
        p = f"backbone.layers.{layer}"
        t.norm(f"{p}.norm", hidden)
        if kind == "M":
            heads, state = config["mamba_num_heads"], config["n_groups"] * config["ssm_state_size"]
            _mamba2(t, f"{p}.mixer", hidden, (heads, config["mamba_head_dim"]), state, config["conv_kernel"])
        elif kind == "*":
            attention(t, f"{p}.mixer", config)
        else:
            t.linear(f"{p}.mixer.gate", experts, hidden)
            t.add(f"{p}.mixer.gate.e_score_correction_bias", experts, dtype="F32")
            t.experts(f"{p}.mixer.experts", experts, hidden, config["moe_intermediate_size"], gateless)
            t.mlp(f"{p}.mixer.shared_experts", hidden, config["moe_shared_expert_intermediate_size"], gateless)


def lfm2_moe(t: Tensors, config: Config) -> None:
    """LFM2: short convolutions in most layers, the first layers dense."""
    hidden, experts = config["hidden_size"], config["num_experts"]
    t.add("model.embed_tokens.weight", config["vocab_size"], hidden)
    t.norm("model.embedding_norm", hidden)
    for layer, kind in enumerate(config["layer_types"]):
        p = f"model.layers.{layer}"
        t.norms(p, ("operator_norm", "ffn_norm"), hidden)
        if kind == "conv":
            t.linear(f"{p}.conv.in_proj", 3 * hidden, hidden)
            t.add(f"{p}.conv.conv.weight", hidden, 1, config["conv_L_cache"])
            t.linear(f"{p}.conv.out_proj", hidden, hidden)
        else:
            _lfm2_attention(t, f"{p}.self_attn", config)
        if layer < config["num_dense_layers"]:
            t.mlp(f"{p}.feed_forward", hidden, config["intermediate_size"], MIXTRAL_GATED)
        else:
            t.linear(f"{p}.feed_forward.gate", experts, hidden)
            t.add(f"{p}.feed_forward.expert_bias", experts, dtype="F32")
            inner = config["moe_intermediate_size"]
            t.experts(f"{p}.feed_forward.experts", experts, hidden, inner, MIXTRAL_GATED)


def _lfm2_attention(t: Tensors, name: str, config: Config) -> None:
    hidden, size = config["hidden_size"], head_dim(config)
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    for projection, rows in (("q", queries), ("k", keys), ("v", keys)):
        t.linear(f"{name}.{projection}_proj", rows, hidden)
    t.linear(f"{name}.out_proj", hidden, queries)
    t.norms(name, ("q_layernorm", "k_layernorm"), size)


TINY_MAMBA2 = {"mamba_n_heads": 5, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}

CHECKPOINTS = (
    Checkpoint(repo="ibm-granite/granite-3.1-3b-a800m-instruct", tensors=granitemoe, billions=3.3),
    Checkpoint(
        repo="ibm-granite/granite-4.0-h-tiny",
        tensors=granitemoehybrid,
        billions=6.94,
        layers=6,
        tiny={"shared_intermediate_size": 28, **TINY_MAMBA2},
    ),
    Checkpoint(
        repo="ai21labs/Jamba-v0.1",
        tensors=jamba,
        billions=51.6,
        layers=6,
        tiny={"mamba_d_state": 4, "mamba_dt_rank": 3, "use_mamba_kernels": False},
    ),
    Checkpoint(
        repo="nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        tensors=nemotron_h,
        billions=31.6,
        layers=7,
        tiny={
            "mamba_num_heads": 5,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 16,
            "moe_shared_expert_intermediate_size": 28,
        },
    ),
    Checkpoint(repo="LiquidAI/LFM2-8B-A1B", tensors=lfm2_moe, billions=8.34, layers=4),
)
