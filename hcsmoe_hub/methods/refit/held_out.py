"""Which calibration tokens a fit never sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# One stretch in eight, all along the calibration set, so that every kind of text in it is judged.
STRETCH_TOKENS = 256
HELD_OUT_SHARE = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """Calibration tokens that a fit sees, and those that judge it.

    Attributes:
        fitted: Numbers of the tokens that a fit may see, ascending int64.
        held_out: Numbers of the others by domain, ascending int64; every domain that is named has some.
    """

    fitted: Tensor
    held_out: Mapping[str, Tensor]

    @property
    def judged(self) -> Tensor:
        """The held-out tokens of all domains, ascending int64."""
        return torch.cat(list(self.held_out.values())).sort().values


def split_tokens(tokens: int, domains: Sequence[str] = ("",)) -> Split:
    """Splits the tokens of a calibration set; neither part is empty from two tokens on.

    Args:
        tokens: How many there are.
        domains: Domain of each of the sequences, equally long, that they come from; a single one where that is unknown.
    """
    number = torch.arange(tokens)
    stretch = min(STRETCH_TOKENS, max(1, tokens // HELD_OUT_SHARE))
    is_held_out = number // stretch % HELD_OUT_SHARE == HELD_OUT_SHARE - 1
    if not is_held_out.any():
        is_held_out[-1] = True
    names = list(dict.fromkeys(domains))
    domain_T = torch.tensor([names.index(name) for name in domains]).repeat_interleave(-(-tokens // len(domains)))
    parts = {name: number[is_held_out & (domain_T[:tokens] == place)] for place, name in enumerate(names)}
    return Split(fitted=number[~is_held_out], held_out={name: part for name, part in parts.items() if len(part)})
