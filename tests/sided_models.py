"""Tiny models with an encoder and a decoder, with tokenizers."""

from pathlib import Path
from typing import Any

import torch
from sided_text import T5_VOCABULARY, write_nllb_tokenizer, write_t5_tokenizer
from transformers import (
    AutoTokenizer,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    PreTrainedModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

EXPERTS = 8


def build_switch(folder: Path, **changes: Any) -> Path:
    """A random Switch Transformer of two layers in each stack, one of them sparse, with T5's tokenizer."""
    settings = {
        "vocab_size": T5_VOCABULARY,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "num_experts": EXPERTS,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 64,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**settings | changes))
    _save(model, folder)
    return write_t5_tokenizer(folder)


def build_nllb(folder: Path, **languages: Any) -> Path:
    """A random NLLB-MoE of two layers in each stack, one of them sparse, with a tokenizer of one id per character."""
    write_nllb_tokenizer(folder, **languages)
    config = NllbMoeConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(folder)),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        num_experts=EXPERTS,
        expert_capacity=64,
        max_position_embeddings=256,
        moe_eval_capacity_token_fraction=1.0,
        decoder_start_token_id=2,
    )
    torch.manual_seed(0)
    _save(NllbMoeForConditionalGeneration(config), folder)
    return folder


def _save(model: PreTrainedModel, folder: Path) -> None:
    # Small random weights would make all predictions alike.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3 if "router" not in name else 0.6)
    model.eval().save_pretrained(folder)
