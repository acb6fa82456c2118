"""Writes DeepSeek-V3 and Kimi-K2 as folders of headers: published config, names, dtypes and shapes, and no weights.

The shards are as long as the real ones, but files with holes: they take a few megabytes. The layer that predicts a
second token, which a conversion leaves out unless it is asked to keep it, is not written.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 128
SHARD_BYTES = 5_000_000_000
SIZES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
Tensor = tuple[str, str, tuple[int, ...]]

# https://huggingface.co/deepseek-ai/DeepSeek-V3
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    },
}
# https://huggingface.co/moonshotai/Kimi-K2-Instruct, with the ``model_type`` that its README names for such tools.
KIMI_K2 = DEEPSEEK_V3 | {
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
GIANTS = {"DeepSeek-V3": DEEPSEEK_V3, "Kimi-K2": KIMI_K2}


def _linear(name: str, rows: int, columns: int) -> Iterator[Tensor]:
    """A matrix in FP8 and the scales of its blocks."""
    yield f"{name}.weight", "F8_E4M3", (rows, columns)
    yield f"{name}.weight_scale_inv", "F32", (-(-rows // BLOCK), -(-columns // BLOCK))


def _mlp(name: str, hidden: int, inner: int) -> Iterator[Tensor]:
    for part in ("gate", "up"):
        yield from _linear(f"{name}.{part}_proj", inner, hidden)
    yield from _linear(f"{name}.down_proj", hidden, inner)


def _attention(name: str, config: dict[str, Any]) -> Iterator[Tensor]:
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    yield from _linear(f"{name}.q_a_proj", config["q_lora_rank"], hidden)
    yield f"{name}.q_a_layernorm.weight", "BF16", (config["q_lora_rank"],)
    yield from _linear(f"{name}.q_b_proj", heads * (nope + rope), config["q_lora_rank"])
    yield from _linear(f"{name}.kv_a_proj_with_mqa", rank + rope, hidden)
    yield f"{name}.kv_a_layernorm.weight", "BF16", (rank,)
    yield from _linear(f"{name}.kv_b_proj", heads * (nope + value), rank)
    yield from _linear(f"{name}.o_proj", hidden, heads * value)


def tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    """Name, dtype and shape of every stored tensor."""
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{name}.{norm}.weight", "BF16", (hidden,)
        yield from _attention(f"{name}.self_attn", config)
        if layer < config["first_k_dense_replace"]:
            yield from _mlp(f"{name}.mlp", hidden, config["intermediate_size"])
            continue
        yield f"{name}.mlp.gate.weight", "BF16", (config["n_routed_experts"], hidden)
        yield f"{name}.mlp.gate.e_score_correction_bias", "F32", (config["n_routed_experts"],)
        for expert in range(config["n_routed_experts"]):
            yield from _mlp(f"{name}.mlp.experts.{expert}", hidden, inner)
        yield from _mlp(f"{name}.mlp.shared_experts", hidden, inner * config["n_shared_experts"])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        yield name, "BF16", (config["vocab_size"], hidden)
    yield "model.norm.weight", "BF16", (hidden,)


def _nbytes(tensor: Tensor) -> int:
    return math.prod(tensor[2]) * SIZES[tensor[1]]


def _shards(every: Iterator[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in order, cut where a shard would become too large."""
    shard, size = list[Tensor](), 0
    for tensor in every:
        if shard and size + _nbytes(tensor) > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += _nbytes(tensor)
    yield shard


def _write_shard(file: Path, shard: list[Tensor]) -> None:
    """Writes a safetensors header, and makes the file as long as its data would be."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in shard:
        begin, end = end, end + _nbytes((name, dtype, shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)


def write_giant(folder: Path, config: dict[str, Any]) -> Path:
    """Writes a checkpoint of headers into a new folder, which needs a file system with holes.

    Args:
        folder: Is created.
        config: One of ``GIANTS``, or the same with other sizes.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    # Nothing is turned into tokens, but a plan looks for what would do it.
    (folder / "tokenizer.json").write_text("{}\n")
    shards = list(_shards(tensors(config)))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard)
        weight_map |= {tensor[0]: name for tensor in shard}
    total = sum(_nbytes(tensor) for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index) + "\n")
    return folder
