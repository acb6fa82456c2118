"""What a language model does after its decoder. S positions, H hidden size, V vocabulary."""

from typing import Any

import torch
from torch import Tensor

from hcsmoe_hub.model.skeleton import Skeleton


class _Decoded:
    """An output with hidden states only; models pass its other attributes on, and accept ``None`` for them."""

    def __init__(self, hidden_BSH: Tensor) -> None:
        self.last_hidden_state = hidden_BSH

    def __getitem__(self, index: int) -> Tensor:
        assert index == 0, "the states come first"
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


def head(skeleton: Skeleton, hidden_SH: Tensor) -> Tensor:
    """Applies what a language model does after its decoder: the head, and any scaling or capping.

    Args:
        skeleton: A skeleton of which at least the head is loaded.
        hidden_SH: ``[S, H]`` states after the last norm.

    Returns:
        ``[S, V]`` logits on the device of the head.
    """
    decoder, module = skeleton.decoder, skeleton.module
    hidden_BSH = hidden_SH[None].to(module.get_output_embeddings().weight.device)
    found = _Decoded(hidden_BSH)
    # The model's own forward runs with its decoder skipped, so that every step after the decoder is applied.
    vars(decoder)["forward"] = lambda *args, **kwargs: found
    try:
        # A composite looks them up, wherever its embedding is, before it calls its decoder.
        embedding: Any = module.get_input_embeddings()
        ids_BS = torch.zeros(hidden_BSH.shape[:2], dtype=torch.long, device=embedding.weight.device)
        inputs: dict[str, Any] = {"input_ids": ids_BS}
        if skeleton.is_encoder_decoder:
            inputs = {"encoder_outputs": found, "decoder_input_ids": ids_BS}
        logits_SV: Tensor = module(**inputs, use_cache=False).logits[0]
    finally:
        del vars(decoder)["forward"]
    return logits_SV
