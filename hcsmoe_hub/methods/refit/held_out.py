"""Which calibration tokens a fit never sees."""

import torch
from torch import Tensor

# One stretch in eight, all along the calibration set, so that every kind of text in it is judged.
STRETCH_TOKENS = 256
HELD_OUT_SHARE = 8


def split_tokens(tokens: int) -> tuple[Tensor, Tensor]:
    """Token numbers that a fit may see, and those that judge it; both ascending, neither empty from two tokens on."""
    number = torch.arange(tokens)
    stretch = min(STRETCH_TOKENS, max(1, tokens // HELD_OUT_SHARE))
    is_held_out = number // stretch % HELD_OUT_SHARE == HELD_OUT_SHARE - 1
    if not is_held_out.any():
        is_held_out[-1] = True
    return number[~is_held_out], number[is_held_out]
