"""What a model does with the tokens of a sequence: a decoder alone continues it, an encoder and a decoder share it.

B sequences of S + T tokens each, of which an encoder reads the first S and a decoder writes the other T; H hidden size.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from hcsmoe_hub.errors import UnsupportedModelError
from hcsmoe_hub.model.skeleton import Skeleton


def predicted_tokens(ids_BS: Tensor, source_length: int = 0) -> Tensor:
    """The tokens that a model predicts: its hidden state at position t is about column t of what is returned.

    A decoder alone predicts the token after each position, of which the last one has none. A decoder that reads what an
    encoder makes of the source predicts the label at its own position.

    Args:
        ids_BS: ``[B, S + T]`` token ids.
        source_length: S, the tokens that an encoder reads; 0 for a decoder alone.
    """
    return ids_BS[:, source_length or 1 :]


def start_token(config: PreTrainedConfig) -> int:
    """The token before the first label of a decoder that reads what an encoder makes of the source.

    Raises:
        UnsupportedModelError: If the config names none.
    """
    found = getattr(config, "decoder_start_token_id", None)
    found = getattr(config, "pad_token_id", None) if found is None else found
    if not isinstance(found, int):
        raise UnsupportedModelError(
            f"the config of model_type {config.model_type!r} names no token that its decoder starts with.",
            hint="add decoder_start_token_id to config.json",
        )
    return found


def decoder_inputs(config: PreTrainedConfig, labels_BT: Tensor) -> Tensor:
    """What the decoder is given while it predicts some labels: these, shifted to the right, ``[B, T]``."""
    shifted_BT = labels_BT.roll(1, dims=1)
    shifted_BT[:, 0] = start_token(config)
    return shifted_BT


def model_inputs(config: PreTrainedConfig, ids_BS: Tensor, source_length: int = 0) -> dict[str, Tensor]:
    """What the model's own forward takes to compute logits of some sequences.

    Logits are ``[B, S + T, V]`` of a decoder alone, and ``[B, T, V]`` of a decoder behind an encoder; the first ones
    are about ``predicted_tokens``.

    Args:
        config: Of the model.
        ids_BS: ``[B, S + T]`` token ids, int64, where the embeddings are.
        source_length: S, the tokens that an encoder reads; 0 for a decoder alone.
    """
    if not source_length:
        return {"input_ids": ids_BS}
    decoded_BT = decoder_inputs(config, ids_BS[:, source_length:])
    return {"input_ids": ids_BS[:, :source_length], "decoder_input_ids": decoded_BT}


def encode(skeleton: Skeleton, ids_BS: Tensor) -> Tensor:
    """Runs the model's own encoder; ``[B, S, H]`` states after its last norm."""
    encoder: Any = skeleton.module.get_submodule(skeleton.stacks[0].runner_name)
    hidden_BSH: Tensor = encoder(input_ids=ids_BS).last_hidden_state
    return hidden_BSH


def run_through(
    skeleton: Skeleton,
    ids_BS: Tensor,
    *,
    source_length: int = 0,
    encode: Callable[[Skeleton, Tensor], Tensor] = encode,
) -> Tensor:
    """Runs the model's own forward up to its head.

    Args:
        skeleton: The model; its layers may be replaced.
        ids_BS: ``[B, S + T]`` token ids, int64, where the embeddings are.
        source_length: S, the tokens that an encoder reads; 0 for a decoder alone.
        encode: What runs in place of the encoder.

    Returns:
        The decoder's hidden states after its last norm: ``[B, T, H]``.
    """
    decoder: Any = skeleton.decoder
    if not skeleton.is_encoder_decoder:
        hidden_BSH: Tensor = decoder(input_ids=ids_BS, use_cache=False).last_hidden_state
        return hidden_BSH
    assert 0 < source_length < ids_BS.shape[1], "both stacks have tokens"
    encoded_BSH = encode(skeleton, ids_BS[:, :source_length])
    inputs_BT = decoder_inputs(skeleton.config, ids_BS[:, source_length:])
    hidden_BTH: Tensor = decoder(
        input_ids=inputs_BT, encoder_hidden_states=encoded_BSH, use_cache=False
    ).last_hidden_state
    return hidden_BTH


def stack_lengths(ids_BS: Tensor, source_length: int) -> set[int]:
    """Tokens of a sequence in each of the stacks."""
    length = ids_BS.shape[1]
    return {source_length, length - source_length} if source_length else {length}
