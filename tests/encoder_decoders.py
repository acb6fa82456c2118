"""Tiny encoder-decoder models with experts in both stacks: Switch Transformers and NLLB-MoE."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    PreTrainedModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

NLLB_SIZES: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 4,
    "decoder_layers": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
}
EXPERTS, VOCABULARY, SOURCE, TARGET = 8, 64, 12, 6
# MoE layers, numbered through both stacks: every second of four layers of the encoder and of two of the decoder.
MOE_LAYERS = (1, 3, 5)


def switch_model(**changes: Any) -> PreTrainedModel:
    """A Switch Transformers model with random weights, whose experts drop tokens beyond their capacity."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 24,
        "num_heads": 4,
        "num_layers": 4,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 1,
        "num_experts": EXPERTS,
        "expert_capacity": 4,
        "decoder_start_token_id": 0,
    }
    return _random(SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**sizes | changes)))


def nllb_model(**changes: Any) -> PreTrainedModel:
    """An NLLB-MoE model with random weights and biases."""
    sizes: dict[str, Any] = {
        **NLLB_SIZES,
        "vocab_size": VOCABULARY,
        "num_experts": EXPERTS,
        "max_position_embeddings": 64,
    }
    return _random(NllbMoeForConditionalGeneration(NllbMoeConfig(**sizes | changes)))


BUILDERS = {"switch_transformers": switch_model, "nllb-moe": nllb_model}


@torch.no_grad()
def _random(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" not in name or name.endswith("bias"):
            parameter.normal_(0, 0.25, generator=generator)
    return model.eval()


def pairs(batch: int = 3) -> tuple[Tensor, Tensor]:
    """Random sources ``[B, SOURCE]`` and targets ``[B, TARGET]``."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(3, VOCABULARY, (batch, SOURCE), generator=generator)
    return source, torch.randint(3, VOCABULARY, (batch, TARGET), generator=generator)


def logits(model: Any) -> Tensor:
    """Logits ``[3, TARGET, V]`` of targets after their sources."""
    source, target = pairs()
    with torch.no_grad():
        found: Tensor = model(input_ids=source, labels=target, use_cache=False).logits
    return found


def stored_experts(model: PreTrainedModel) -> dict[int, Any]:
    """The experts modules of a model as transformers builds it, by layer."""
    encoder, decoder = model.get_encoder(), model.get_decoder()
    found = {}
    for offset, stack in ((0, encoder), (4, decoder)):
        for name, module in stack.named_modules():
            if name.endswith(".experts"):
                found[offset + int(name.split(".")[1])] = module
    return found
