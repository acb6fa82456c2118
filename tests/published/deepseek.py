"""DeepSeek-V2 to V3.2, and Kimi-K2, which is DeepSeek-V3 under a name of its own."""

from published.checkpoint import Checkpoint
from published.collector import NORMS, Config, Fp8, Tensors, embeddings, latent_attention


def sparse_block(t: Tensors, name: str, config: Config) -> None:
    """A router with a correction bias, experts stored one by one, and shared experts as one wide block."""
    hidden, experts, inner = config["hidden_size"], config["n_routed_experts"], config["moe_intermediate_size"]
    t.linear(f"{name}.gate", experts, hidden, is_quantized=False)
    if config.get("topk_method", "noaux_tc") == "noaux_tc":
        t.add(f"{name}.gate.e_score_correction_bias", experts, dtype="F32")
    t.experts(f"{name}.experts", experts, hidden, inner)
    if shared := config.get("n_shared_experts"):
        t.mlp(f"{name}.shared_experts", hidden, inner * shared)


def indexer(t: Tensors, name: str, config: Config) -> None:
    """What chooses the keys of sparse attention."""
    heads, size = config["index_n_heads"], config["index_head_dim"]
    t.linear(f"{name}.wq_b", heads * size, config["q_lora_rank"])
    t.linear(f"{name}.wk", size, config["hidden_size"])
    t.norm(f"{name}.k_norm", size, bias=True, dtype="F32" if t.fp8 else None)
    t.linear(f"{name}.weights_proj", heads, config["hidden_size"], is_quantized=False)


def second_token(t: Tensors, name: str, config: Config, *, shares: bool = False) -> None:
    """What the layer that predicts a second token has besides those of a decoder layer.

    Args:
        t: Where to.
        name: Prefix of the layer.
        config: For its sizes.
        shares: Whether it uses the embedding and the head of the model instead of its own.
    """
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    t.norms(name, ("enorm", "hnorm"), hidden)
    t.linear(f"{name}.eh_proj", hidden, 2 * hidden, is_quantized=False)
    t.norm(f"{name}.shared_head.norm", hidden)
    if not shares:
        t.add(f"{name}.embed_tokens.weight", vocabulary, hidden)
        t.add(f"{name}.shared_head.head.weight", vocabulary, hidden)


def deepseek(t: Tensors, config: Config, prefix: str = "model.", *, head: str = "lm_head") -> None:
    """DeepSeek-V2, V3 and V3.2: latent attention, dense layers first, layers for more tokens last."""
    embeddings(t, config, prefix, head=head)
    depth, predictors = config["num_hidden_layers"], config.get("num_nextn_predict_layers") or 0
    for layer in range(depth + predictors):
        p = f"{prefix}layers.{layer}"
        t.norms(p, NORMS, config["hidden_size"])
        latent_attention(t, f"{p}.self_attn", config)
        if "index_n_heads" in config:
            indexer(t, f"{p}.self_attn.indexer", config)
        if layer < config["first_k_dense_replace"]:
            t.mlp(f"{p}.mlp", config["hidden_size"], config["intermediate_size"])
        else:
            sparse_block(t, f"{p}.mlp", config)
        if layer >= depth:
            second_token(t, p, config, shares=config["model_type"] == "glm_moe_dsa")


def packed_experts(t: Tensors, config: Config, prefix: str = "model.", *, head: str = "lm_head") -> None:
    """Kimi-K2-Thinking: routed experts as int4 in groups of 32, eight numbers in an integer, as compressed-tensors."""
    plain = Tensors()
    deepseek(plain, config, prefix, head=head)
    for name, spec in plain.items.items():
        if ".mlp.experts." not in name:
            t.add(name, *spec.shape, dtype=spec.dtype)
            continue
        rows, columns = spec.shape
        t.add(f"{name}_packed", rows, -(-columns // 8), dtype="I32")
        t.add(f"{name}_scale", rows, columns // 32)
        t.add(f"{name}_shape", 2, dtype="I64")


BLOCKS = Fp8(scales="F32")
# Whole blocks and a part of the next. The 272 rows of kv_a_proj_with_mqa cannot be split into its three rows of scales
# evenly, as the published 576 cannot into five; the others could, but into blocks of another size.
ODD = {
    "hidden_size": 136,
    "intermediate_size": 144,
    "moe_intermediate_size": 136,
    "q_lora_rank": 130,
    "kv_lora_rank": 256,
    "qk_rope_head_dim": 16,
    "num_key_value_heads": 4,
}
V3_ODD = ODD | {"n_group": 2, "topk_group": 1}

CHECKPOINTS = (
    Checkpoint(
        repo="deepseek-ai/DeepSeek-V2-Lite",
        tensors=deepseek,
        billions=15.7,
        tiny={"num_key_value_heads": 4},
    ),
    Checkpoint(repo="deepseek-ai/DeepSeek-V3", tensors=deepseek, billions=684.5, fp8=BLOCKS, tiny=V3_ODD),
    Checkpoint(
        repo="deepseek-ai/DeepSeek-V3.2-Exp",
        tensors=deepseek,
        billions=685.4,
        fp8=BLOCKS,
        tiny={**V3_ODD, "index_head_dim": 32},
    ),
    Checkpoint(repo="moonshotai/Kimi-K2-Instruct", tensors=deepseek, billions=1026.4, fp8=BLOCKS, tiny=ODD),
    Checkpoint(
        repo="moonshotai/Kimi-K2-Thinking",
        tensors=packed_experts,
        billions=1026.4,
        tiny={"hidden_size": 64, "moe_intermediate_size": 32, "num_key_value_heads": 4},
    ),
)
