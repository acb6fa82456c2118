"""DeepSeek-V4: names of its own, FP8 attention, FP4 experts, and routing by a table from token to experts."""

from published.checkpoint import Checkpoint
from published.collector import MIXTRAL_GATED, Config, Fp8, Tensors

# Numbers of FP4 that share a scale.
FP4_GROUP = 32


def deepseek_v4(t: Tensors, config: Config) -> None:
    """DeepSeek-V4: no prefix, hyper-connections around attention and experts, one layer more for a second token."""
    hidden, vocabulary, depth = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    t.add("embed.weight", vocabulary, hidden)
    t.add("head.weight", vocabulary, hidden)
    t.norm("norm", hidden)
    for layer in range(depth):
        _layer(t, f"layers.{layer}", config, layer)
    _hyper_connection(t, "hc_head", config, rows=config["hc_mult"], scales=1)
    for number in range(config["num_nextn_predict_layers"]):
        p = f"mtp.{number}"
        _layer(t, p, config, depth + number)
        t.linear(f"{p}.e_proj", hidden, hidden)
        t.linear(f"{p}.h_proj", hidden, hidden)
        t.norms(p, ("enorm", "hnorm", "norm"), hidden)
        _hyper_connection(t, f"{p}.hc_head", config, rows=config["hc_mult"], scales=1)


def _layer(t: Tensors, p: str, config: Config, layer: int) -> None:
    hidden, experts, inner = config["hidden_size"], config["n_routed_experts"], config["moe_intermediate_size"]
    streams = config["hc_mult"]
    _attention(t, f"{p}.attn", config, config["compress_ratios"][layer])
    t.norms(p, ("attn_norm", "ffn_norm"), hidden)
    for name in ("hc_attn", "hc_ffn"):
        _hyper_connection(t, f"{p}.{name}", config, rows=streams * (streams + 2), scales=3)
    t.linear(f"{p}.ffn.gate", experts, hidden, is_quantized=False)
    if layer < config["num_hash_layers"]:
        t.add(f"{p}.ffn.gate.tid2eid", config["vocab_size"], config["num_experts_per_tok"], dtype="I64")
    else:
        t.add(f"{p}.ffn.gate.bias", experts, dtype="F32")
    for expert in range(experts):
        for name, rows, columns in (("w1", inner, hidden), ("w2", hidden, inner), ("w3", inner, hidden)):
            projection = f"{p}.ffn.experts.{expert}.{name}"
            t.add(f"{projection}.weight", rows, columns // 2, dtype="I8")
            t.add(f"{projection}.scale", rows, columns // FP4_GROUP, dtype="F8_E8M0")
    t.mlp(f"{p}.ffn.shared_experts", hidden, inner * config["n_shared_experts"], MIXTRAL_GATED)


def _hyper_connection(t: Tensors, name: str, config: Config, *, rows: int, scales: int) -> None:
    """Weights that mix the parallel residual streams."""
    t.add(f"{name}_fn", rows, config["hc_mult"] * config["hidden_size"], dtype="F32")
    t.add(f"{name}_base", rows, dtype="F32")
    t.add(f"{name}_scale", scales, dtype="F32")


def _attention(t: Tensors, name: str, config: Config, ratio: int) -> None:
    """Attention with one key and value per position, and with compressed ones of the past where there is a ratio."""
    hidden, heads, size = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    rank, groups = config["q_lora_rank"], config["o_groups"]
    t.add(f"{name}.attn_sink", heads, dtype="F32")
    t.linear(f"{name}.wq_a", rank, hidden)
    t.norm(f"{name}.q_norm", rank)
    t.linear(f"{name}.wq_b", heads * size, rank)
    t.linear(f"{name}.wkv", size, hidden)
    t.norm(f"{name}.kv_norm", size)
    t.linear(f"{name}.wo_a", groups * config["o_lora_rank"], heads * size // groups)
    t.linear(f"{name}.wo_b", hidden, groups * config["o_lora_rank"])
    if ratio:
        _compressor(t, f"{name}.compressor", hidden, ratio, size)
    if ratio == 4:
        t.linear(f"{name}.indexer.wq_b", config["index_n_heads"] * config["index_head_dim"], rank)
        t.linear(f"{name}.indexer.weights_proj", config["index_n_heads"], hidden, is_quantized=False)
        _compressor(t, f"{name}.indexer.compressor", hidden, ratio, config["index_head_dim"])


def _compressor(t: Tensors, name: str, hidden: int, ratio: int, size: int) -> None:
    # Short windows overlap, so they have two halves.
    width = size * (2 if ratio == 4 else 1)
    t.add(f"{name}.ape", ratio, width, dtype="F32")
    t.linear(f"{name}.wkv", width, hidden, is_quantized=False)
    t.linear(f"{name}.wgate", width, hidden, is_quantized=False)
    t.norm(f"{name}.norm", size)


CHECKPOINTS = (
    Checkpoint(
        repo="deepseek-ai/DeepSeek-V4-Flash",
        tensors=deepseek_v4,
        billions=290.0,
        fp8=Fp8(scales="F8_E8M0", suffix="scale"),
        layers=5,
        tiny={
            "hidden_size": 160,
            "moe_intermediate_size": 96,
            "head_dim": 16,
            "num_key_value_heads": 1,
            "compress_ratios": [0, 0, 4, 128, 4, 0],
            "num_hash_layers": 2,
            "hc_mult": 2,
            "o_groups": 2,
            "o_lora_rank": 8,
            "index_head_dim": 16,
        },
    ),
)
