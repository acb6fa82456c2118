"""ERNIE 4.5, Hunyuan, DBRX and dots.llm1."""

from published.checkpoint import Checkpoint
from published.collector import NORMS, Config, Tensors, attention, embeddings, head_dim
from published.deepseek import sparse_block


def ernie4_5(t: Tensors, config: Config) -> None:
    """ERNIE 4.5: the correction bias next to the router, and a dense layer for a second token."""
    embeddings(t, config)
    layers = range(config["num_hidden_layers"])
    for layer in layers:
        _ernie_layer(t, f"model.layers.{layer}", config, is_dense=layer < config["moe_layer_start_index"])
    hidden = config["hidden_size"]
    for number in range(config["num_nextn_predict_layers"]):
        _ernie_layer(t, f"model.mtp_block.{number}", config, is_dense=True)
        t.norm(f"model.mtp_emb_norm.{number}", hidden)
        t.norm(f"model.mtp_hidden_norm.{number}", hidden)
        t.linear(f"model.mtp_linear_proj.{number}", hidden, 2 * hidden)


def _ernie_layer(t: Tensors, p: str, config: Config, *, is_dense: bool) -> None:
    hidden, experts, inner = config["hidden_size"], config["moe_num_experts"], config["moe_intermediate_size"]
    t.norms(p, NORMS, hidden)
    attention(t, f"{p}.self_attn", config)
    if is_dense:
        t.mlp(f"{p}.mlp", hidden, config["intermediate_size"])
        return
    t.add(f"{p}.mlp.gate.weight", experts, hidden, dtype="F32")
    t.add(f"{p}.mlp.moe_statics.e_score_correction_bias", 1, experts, dtype="F32")
    t.experts(f"{p}.mlp.experts", experts, hidden, inner)
    t.mlp(f"{p}.mlp.shared_experts", hidden, inner * config["moe_num_shared_experts"])


def hunyuan(t: Tensors, config: Config) -> None:
    """Hunyuan-A13B: sizes and top-k as a list with a number per layer."""
    hidden, experts = config["hidden_size"], config["num_experts"]
    embeddings(t, config)
    for layer, inner in enumerate(config["moe_intermediate_size"]):
        p = f"model.layers.{layer}"
        t.norms(p, NORMS, hidden)
        attention(t, f"{p}.self_attn", config)
        t.norms(f"{p}.self_attn", ("query_layernorm", "key_layernorm"), head_dim(config))
        t.add(f"{p}.mlp.gate.wg.weight", experts, hidden, dtype="F32")
        t.experts(f"{p}.mlp.experts", experts, hidden, inner)
        t.mlp(f"{p}.mlp.shared_mlp", hidden, inner * config["num_shared_expert"][layer])


def dbrx(t: Tensors, config: Config) -> None:
    """DBRX: experts below each other in three matrices, and keys of the config under names of its own."""
    hidden, feed_forward = config["d_model"], config["ffn_config"]
    experts, inner = feed_forward["moe_num_experts"], feed_forward["ffn_hidden_size"]
    keys = config["attn_config"]["kv_n_heads"] * hidden // config["n_heads"]
    t.add("transformer.wte.weight", config["vocab_size"], hidden)
    t.norm("transformer.norm_f", hidden)
    t.add("lm_head.weight", config["vocab_size"], hidden)
    for layer in range(config["n_layers"]):
        p = f"transformer.blocks.{layer}"
        t.linear(f"{p}.norm_attn_norm.attn.Wqkv", hidden + 2 * keys, hidden)
        t.linear(f"{p}.norm_attn_norm.attn.out_proj", hidden, hidden)
        t.norms(f"{p}.norm_attn_norm", ("norm_1", "norm_2"), hidden)
        t.add(f"{p}.ffn.router.layer.weight", experts, hidden)
        for matrix in ("w1", "v1", "w2"):
            t.add(f"{p}.ffn.experts.mlp.{matrix}", experts * inner, hidden)


def dots1(t: Tensors, config: Config) -> None:
    """dots.llm1: the attention of Qwen3, the experts of DeepSeek-V3."""
    embeddings(t, config)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        t.norms(p, NORMS, config["hidden_size"])
        attention(t, f"{p}.self_attn", config)
        t.norms(f"{p}.self_attn", ("q_norm", "k_norm"), head_dim(config))
        if layer < config["first_k_dense_replace"]:
            t.mlp(f"{p}.mlp", config["hidden_size"], config["intermediate_size"])
        else:
            sparse_block(t, f"{p}.mlp", config)


CHECKPOINTS = (
    Checkpoint(repo="baidu/ERNIE-4.5-21B-A3B-PT", tensors=ernie4_5, billions=21.8),
    Checkpoint(
        repo="tencent/Hunyuan-A13B-Instruct",
        tensors=hunyuan,
        billions=80.4,
        tiny={
            "attention_head_dim": 8,
            "eod_token_id": 3,
            "intermediate_size": 24,
            "moe_intermediate_size": [24, 24],
            "moe_topk": [2, 2],
            "num_shared_expert": [1, 1],
            "pad_id": 0,
            "sep_token_id": 4,
        },
    ),
    Checkpoint(
        repo="databricks/dbrx-base",
        tensors=dbrx,
        billions=131.6,
        tiny={
            "d_model": 40,
            "n_heads": 4,
            "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 2},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2},
        },
    ),
    Checkpoint(repo="rednote-hilab/dots.llm1.inst", tensors=dots1, billions=142.8),
)
