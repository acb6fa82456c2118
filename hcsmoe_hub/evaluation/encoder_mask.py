"""Hides the padding of shorter sources from an encoder, and from the decoder that reads what it made of them.

B sources of S tokens, R rows of a pass, which may be a few more than B.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hcsmoe_hub.model.skeleton import Skeleton


@contextmanager
def hiding_padding(skeleton: Skeleton, lengths: Sequence[int]) -> Iterator[None]:
    """Passes a mask to both stacks in a ``with`` block; none is needed where all sources are equally long.

    Args:
        skeleton: The model.
        lengths: Tokens of each source; the longest is not padded, others are on the right.
    """
    longest = max(lengths)
    if min(lengths) == longest:
        yield
        return
    mask_BS = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long()
    encoder, decoder = skeleton.module.get_submodule(skeleton.stacks[0].runner_name), skeleton.decoder
    vars(encoder)["forward"] = partial(_masked, encoder, "attention_mask", mask_BS)
    vars(decoder)["forward"] = partial(_masked, decoder, "encoder_attention_mask", mask_BS)
    try:
        yield
    finally:
        del vars(encoder)["forward"], vars(decoder)["forward"]


def _masked(module: nn.Module, name: str, mask_BS: Tensor, /, *args: Any, **kwargs: Any) -> Any:
    """What the model calls in place of a stack."""
    ids: Tensor = kwargs["input_ids"]
    # Rows beyond the sources are copies of the first one.
    more = len(ids) - len(mask_BS)
    mask_RS = torch.cat([mask_BS, mask_BS[:1].expand(more, -1)]).to(ids.device)
    forward: Any = type(module).forward
    return forward(module, *args, **{name: mask_RS}, **kwargs)
