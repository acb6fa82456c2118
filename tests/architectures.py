"""A tiny model of every architecture: the smallest config that its class accepts, with random weights.

Two or more layers, hidden size 32, six experts of which a token visits two (one where the architecture says so).
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers
from encoder_decoders import NLLB_SIZES
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from hcsmoe_hub.model.architectures import FAMILIES

EXPERTS, TOP_K, VOCABULARY = 6, 2, 64
# Language models that transformers has a class for; those of the others exist within a larger model only.
_WITHIN = {"ernie4_5_vl_moe_text", "glm4v_moe_text", "qwen3_omni_moe_text", "qwen3_vl_moe_text"}
# Models with an encoder, which reads the first half of every sequence of token ids.
ENCODER_DECODER = ["nllb-moe", "switch_transformers"]
_DECODERS = {family.language_model for family in FAMILIES if not family.refusal} - _WITHIN - {*ENCODER_DECODER}
SUPPORTED = [*sorted(_DECODERS), *ENCODER_DECODER]
REFUSED = sorted({family.language_model for family in FAMILIES if family.refusal} - _WITHIN)
COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

# Given to every config class that has a field of that name.
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_experts_per_tok": TOP_K,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# Multi-head latent attention has as many keys as queries.
LATENT = {"num_key_value_heads": 4}
SLIDING = {"sliding_window": 8}
INKLING: dict[str, Any] = {
    "unpadded_vocab_size": VOCABULARY,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "num_hidden_layers": 4,
}
# Additional or different settings of an architecture.
SPECIAL: dict[str, dict[str, Any]] = {
    "afmoe": {**SLIDING, "num_dense_layers": 1, "num_hidden_layers": 3, "global_attn_every_n_layers": 2},
    "aria_text": {"moe_topk": TOP_K},
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": {
        **LATENT,
        "num_experts_per_token": TOP_K,
        "num_expert_group": 1,
        "model_max_length": 128,
        "num_mtp_layers": 0,
        "layer_group_size": 2,
        "num_hidden_layers": 4,
    },
    "beam": {**SLIDING, "num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "cohere2_moe": {**SLIDING, "num_hidden_layers": 4, "prefix_dense_intermediate_size": 48},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K},
    },
    "deepseek_v2": {**LATENT, "topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "deepseek_v4": {
        **SLIDING,
        "num_hidden_layers": 4,
        "o_groups": 2,
        "o_lora_rank": 8,
        "hc_mult": 2,
        "num_nextn_predict_layers": 0,
    },
    "doge": {"is_moe": True, "num_experts": 16},
    "dots1": SLIDING,
    "dots3_note_text": {**LATENT, "shared_experts_intermediate_size": 24},
    "ernie4_5_moe": {"moe_k": TOP_K, "moe_layer_start_index": 1},
    "exaone_moe": {**SLIDING, "num_hidden_layers": 3},
    "flint": {"sliding_window": 9, "num_hidden_layers": 3},
    "gemma4_text": {
        **SLIDING,
        "enable_moe_block": True,
        "top_k_experts": TOP_K,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 8,
    },
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt_oss": SLIDING,
    "granitemoe_swa": SLIDING,
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 16,
    },
    "hunyuan_v1_moe": {"moe_topk": TOP_K},
    "hy_v4": {"hc_mult": 2},
    "inkling2_text": {**INKLING, "n_layers_per_attn_res_block": 2},
    "inkling_text": {**INKLING, "num_mtp_layers": None},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "jetmoe": {"kv_channels": 8, "num_key_value_heads": 4},
    "kimi_linear": {
        "num_experts_per_token": TOP_K,
        "num_expert_group": 1,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    },
    "kolibri1": {"sliding_window": 9},
    "laguna": {**SLIDING, "num_hidden_layers": 3},
    "lfm2_moe": {
        "num_dense_layers": 1,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "llama4_text": {
        "intermediate_size_mlp": 48,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 4,
        "attention_chunk_size": 16,
    },
    "longcat_flash": {
        **LATENT,
        "num_layers": 2,
        "moe_topk": TOP_K,
        "zero_expert_num": 2,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
    },
    "mellum": SLIDING,
    "mimo_v2_flash": {"sliding_window": 9, "num_hidden_layers": 3},
    "minimax": {"block_size": 8},
    "minimax_m3_vl_text": {
        "dense_intermediate_size": 48,
        "rotary_dim": 8,
        "index_block_size": 8,
        "index_topk_blocks": 2,
        "num_hidden_layers": 3,
        "index_dim": 16,
    },
    "mistral4": LATENT,
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "num_hidden_layers": 4,
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 24,
        "use_mamba_kernels": False,
    },
    "nllb-moe": {**NLLB_SIZES, "decoder_start_token_id": 2, "tie_word_embeddings": True},
    "qwen2_moe": SLIDING,
    "qwen3_5_moe_text": {"num_hidden_layers": 4},
    "qwen3_next": {"num_hidden_layers": 4},
    "qwen4_exp_text": {
        "num_hidden_layers": 4,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 101,
        "make_ngram_vocab_size_divisible_by": 4,
        "split_ngram_parts": 4,
        "heads_per_ngram": 2,
        "ple_embed_dim": 16,
        "ple_layer_ids": [1],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "output_gate_type": "sigmoid",
    },
    "switch_transformers": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 24,
        "num_heads": 4,
        "num_layers": 4,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 2,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": True,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16, "num_hidden_layers": 4},
}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The tiny config of an architecture; ``changes`` win over everything else."""
    kind = CONFIG_MAPPING[model_type]
    fields = {field.name for field in dataclasses.fields(kind)}
    values = {name: value for name, value in COMMON.items() if name in fields}
    count = next((name for name in COUNT_NAMES if name in fields), None)
    if count is not None:
        values[count] = EXPERTS
    if model_type in ("dbrx", *ENCODER_DECODER):
        # Sizes have names of their own, or live in nested configs; the names of other models only alias them.
        values = {name: value for name, value in values.items() if name not in kind.attribute_map}
    return kind(**{**values, **SPECIAL.get(model_type, {}), **changes})


def tiny_model(model_type: str, **changes: Any) -> PreTrainedModel:
    """A tiny model whose experts, routers and biases are random enough for every expert to matter."""
    config = tiny_config(model_type, **changes)
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | {
        name: MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES[name] for name in ENCODER_DECODER
    }
    name = names.get(model_type) or model_type.capitalize() + "ForCausalLM"
    model: PreTrainedModel = getattr(transformers, name)(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            elif "bias" in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for buffer_name, buffer in model.named_buffers():
            if "correction_bias" in buffer_name or "expert_bias" in buffer_name:
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
            elif buffer_name.endswith("tid2eid"):
                buffer.copy_(torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in buffer]))
    return model


def inputs_of(model: PreTrainedModel, ids_BS: Tensor) -> dict[str, Any]:
    """What a model is called with: an encoder reads the first half of every sequence, and a decoder the other one."""
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids_BS, "use_cache": False}
    half = ids_BS.shape[1] // 2
    labels = ids_BS[:, half:]
    start = torch.full_like(labels[:, :1], model.generation_config.decoder_start_token_id)
    inputs = torch.cat([start, labels[:, :-1]], dim=1)
    return {"input_ids": ids_BS[:, :half], "decoder_input_ids": inputs, "use_cache": False}


def save_tiny(model_type: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """Saves a tiny model in several shards, as a Hub checkpoint would be laid out."""
    model = tiny_model(model_type, **changes)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model
