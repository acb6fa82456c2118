"""Configurations of the models that ``third_model.py`` trains, and the balance of their routers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

# Hidden size, width of an expert, decoder layers, attention heads.
SIZES: Mapping[str, tuple[int, int, int, int]] = {"small": (128, 96, 4, 4), "medium": (160, 96, 5, 5)}
ACTIVE_EXPERTS = 4
# What a router's bias changes by in a step, towards experts that are used less than the mean (arXiv 2408.15664).
BIAS_STEP = 0.001
FAMILIES: Mapping[str, tuple[Any, Any]] = {
    "olmoe": (OlmoeConfig, OlmoeForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
}


def shape_of(family: str, size: str, experts: int) -> dict[str, Any]:
    """The settings of a family in a size.

    ``olmoe`` and ``qwen3_moe`` route by a softmax and are balanced by a loss; ``qwen3_moe`` has grouped attention.
    ``deepseek_v3`` routes by sigmoids with a bias, has a shared expert, a dense first layer and latent attention.
    """
    hidden, width, layers, heads = SIZES[size]
    common = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    common |= {"num_experts_per_tok": ACTIVE_EXPERTS}
    if family == "olmoe":
        return common | {"intermediate_size": width, "num_experts": experts, "output_router_logits": True}
    if family == "qwen3_moe":
        grouped = {"num_key_value_heads": heads // 2, "head_dim": hidden // heads, "norm_topk_prob": True}
        routing = {"num_experts": experts, "output_router_logits": True, "router_aux_loss_coef": 0.01}
        return common | grouped | routing | {"moe_intermediate_size": width, "intermediate_size": 4 * width}
    latent = {"q_lora_rank": None, "kv_lora_rank": hidden // 2, "v_head_dim": hidden // heads}
    latent |= {"qk_rope_head_dim": hidden // heads // 2, "qk_nope_head_dim": hidden // heads // 2}
    routing = {"n_routed_experts": experts, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
    others = {"n_shared_experts": 1, "first_k_dense_replace": 1, "intermediate_size": 4 * width}
    return common | latent | routing | others | {"moe_intermediate_size": width, "num_nextn_predict_layers": 0}


def untrained(
    tokenizer: PreTrainedTokenizerBase, family: str, size: str, *, experts: int, length: int
) -> PreTrainedModel:
    """A model with random weights, float32.

    Args:
        tokenizer: Decides the vocabulary and the special tokens.
        family: One of ``FAMILIES``.
        size: One of ``SIZES``.
        experts: Experts of every MoE layer.
        length: Maximum length of a sequence.
    """
    config, model = FAMILIES[family]
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": length, "tie_word_embeddings": True}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    built: PreTrainedModel = model(config(**shape_of(family, size, experts), **text, **ids))
    return built


@contextmanager
def loads(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Counts how often each expert is chosen meanwhile: by the name of the router, ``[N]`` float32."""
    counts: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        # Routers of these families return logits, weights and the chosen experts.
        if name.endswith(".gate") and not isinstance(module, nn.Linear):

            def count(module: Any, args: Any, found: Any, name: str = name) -> None:
                counts[name] = torch.bincount(found[-1].flatten(), minlength=found[0].shape[-1]).float()

            handles.append(module.register_forward_hook(count))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def balance_biases(model: PreTrainedModel, counts: Mapping[str, Tensor]) -> None:
    """Moves the biases of routers that have them towards an even use of the experts."""
    for name, chosen in counts.items():
        bias = getattr(model.get_submodule(name), "e_score_correction_bias", None)
        if bias is not None:
            bias += BIAS_STEP * torch.sign(chosen.mean() - chosen)
