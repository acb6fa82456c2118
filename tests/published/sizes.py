"""Cuts published configs down: to a few layers, or to a model of tiny and odd sizes."""

import copy
from collections.abc import Mapping
from typing import Any

from published.collector import Config

DEPTH_KEYS = ("num_hidden_layers", "n_layers", "num_layers", "encoder_layers")
# Lists of layer numbers, which start from one.
NUMBER_LISTS = ("full_attn_layers", "kda_layers")
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

EXPERTS, TOP_K, VOCABULARY = 8, 2, 71
# Ids below this one are text in a tiny checkpoint; markers of images and the like lie above.
TEXT_IDS = 60

# What every key of these names has in a tiny checkpoint.
TINY: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "experts_per_token": TOP_K,
    "moe_k": TOP_K,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 12,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "sliding_window": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "mrope_section": [2, 1, 1],
}


def text_section(config: Config) -> Config:
    """The part of a config that describes the language model: the whole of it, unless the model has other parts."""
    for name in ("thinker_config", "text_config"):
        if isinstance(section := config.get(name), dict):
            return text_section(section)
    return config


def depth(config: Config) -> int:
    """Number of decoder layers."""
    section = text_section(config)
    return next(section[key] for key in DEPTH_KEYS if key in section)


def shallow(config: Config, layers: int) -> Config:
    """A copy of a config with its first decoder layers only, and with lists that fit them."""
    config = copy.deepcopy(config)
    section, before = text_section(config), depth(config)
    for key, value in section.items():
        if key in DEPTH_KEYS:
            section[key] = layers
        elif key == "num_sparse_encoder_layers":
            section[key] = value * layers // before
        elif isinstance(value, list | str) and len(value) == before:
            section[key] = value[:layers]
        elif isinstance(value, list) and len(value) == before + 1:
            # The layer for multi-token prediction comes last.
            section[key] = [*value[:layers], value[-1]]
        elif isinstance(value, dict):
            for name, inner in value.items():
                if name in NUMBER_LISTS:
                    value[name] = [number for number in inner if number <= layers]
                elif isinstance(inner, list) and len(inner) == before:
                    value[name] = inner[:layers]
    return config


def merged(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy of a config with some keys changed, section by section; ``None`` stays a value."""
    result = dict(config)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


def tiny(config: Config, layers: int, changes: Mapping[str, Any]) -> Config:
    """A copy of a config whose text model has some layers and the sizes of ``TINY``; ``changes`` to all of it win."""
    whole = shallow(config, layers)
    section = text_section(whole)
    for key, value in section.items():
        # A size of nothing stays: such a model lacks the part.
        if key in TINY and value not in (None, 0):
            section[key] = TINY[key]
        elif isinstance(value, dict):
            value.update({name: TINY[name] for name in value if name in TINY})
    return merged(whole, changes)
