"""Mixtral, and models of its names: MiniMax-M2 and Phi-3.5-MoE."""

from published.checkpoint import Checkpoint
from published.collector import MIXTRAL_GATED, NORMS, Config, Fp8, Tensors, attention, embeddings, head_dim

EXPERTS = "block_sparse_moe"


def mixtral(t: Tensors, config: Config) -> None:
    """Mixtral: experts of ``w1``, ``w2`` and ``w3`` in ``block_sparse_moe``."""
    hidden, experts = config["hidden_size"], config["num_local_experts"]
    embeddings(t, config)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        t.norms(p, NORMS, hidden)
        attention(t, f"{p}.self_attn", config)
        t.linear(f"{p}.{EXPERTS}.gate", experts, hidden, is_quantized=False)
        t.experts(f"{p}.{EXPERTS}.experts", experts, hidden, config["intermediate_size"], MIXTRAL_GATED)


def minimax_m2(t: Tensors, config: Config) -> None:
    """MiniMax-M2: as Mixtral, with norms over all heads and a correction bias next to the router."""
    mixtral(t, config)
    size = head_dim(config)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        t.norm(f"{p}.self_attn.q_norm", config["num_attention_heads"] * size)
        t.norm(f"{p}.self_attn.k_norm", config["num_key_value_heads"] * size)
        t.add(f"{p}.{EXPERTS}.e_score_correction_bias", config["num_local_experts"], dtype="F32")


def phimoe(t: Tensors, config: Config) -> None:
    """Phi-3.5-MoE: as Mixtral, with biases in attention, norms and head."""
    hidden, experts = config["hidden_size"], config["num_local_experts"]
    t.add("model.embed_tokens.weight", config["vocab_size"], hidden)
    t.norm("model.norm", hidden, bias=True)
    t.linear("lm_head", config["vocab_size"], hidden, bias=True)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        t.norms(p, NORMS, hidden, bias=True)
        attention(t, f"{p}.self_attn", config, bias=True, o_bias=True)
        t.linear(f"{p}.{EXPERTS}.gate", experts, hidden)
        t.experts(f"{p}.{EXPERTS}.experts", experts, hidden, config["intermediate_size"], MIXTRAL_GATED)


CHECKPOINTS = (
    Checkpoint(
        repo="mistralai/Mixtral-8x7B-v0.1",
        tensors=mixtral,
        billions=46.7,
        files={f"consolidated.{number:02}.pt": 10**10 for number in range(8)},
    ),
    Checkpoint(repo="mistralai/Mixtral-8x22B-v0.1", tensors=mixtral, billions=140.6),
    Checkpoint(repo="s3nh/TinyLLama-4x1.1B-MoE", tensors=mixtral, billions=3.38),
    Checkpoint(
        repo="MiniMaxAI/MiniMax-M2",
        tensors=minimax_m2,
        billions=228.7,
        fp8=Fp8(scales="F32"),
        tiny={"hidden_size": 136, "intermediate_size": 144, "rotary_dim": 4},
    ),
    Checkpoint(
        repo="microsoft/Phi-3.5-MoE-instruct",
        tensors=phimoe,
        billions=41.9,
        tiny={"rope_scaling": {"long_factor": [1.0, 2.0, 3.0, 4.0, 5.0], "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4]}},
    ),
)
