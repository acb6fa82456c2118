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
        held_out: Numbers of the others by domain, ascending int64; a domain of a single token has none.
    """

    fitted: Tensor
    held_out: Mapping[str, Tensor]

    @property
    def judged(self) -> Tensor:
        """The held-out tokens of all domains, ascending int64."""
        return torch.cat(list(self.held_out.values())).sort().values


def split_tokens(tokens: int, domains: Sequence[str] = ("",)) -> Split:
    """Splits the tokens of a calibration set, every domain alike; neither part is empty from two tokens on.

    The stretches are counted within each domain: sequences of several domains may take turns, and any count over all of
    them could fall on the same domain again and again.

    Args:
        tokens: How many there are.
        domains: Domain of each of the sequences, equally long, that they come from; a single one where that is unknown.
    """
    names = list(dict.fromkeys(domains))
    domain_T = torch.tensor([names.index(name) for name in domains]).repeat_interleave(-(-tokens // len(domains)))
    is_held_out = torch.zeros(tokens, dtype=torch.bool)
    held_out = {}
    for place, name in enumerate(names):
        (own,) = torch.where(domain_T[:tokens] == place)
        is_chosen = _is_held_out(len(own))
        if is_chosen.any():
            held_out[name] = own[is_chosen]
            is_held_out[held_out[name]] = True
    return Split(fitted=torch.where(~is_held_out)[0], held_out=held_out)


def _is_held_out(tokens: int) -> Tensor:
    """Which of the tokens of one domain judge a fit; the last one of few."""
    stretch = min(STRETCH_TOKENS, max(1, tokens // HELD_OUT_SHARE))
    is_chosen = torch.arange(tokens) // stretch % HELD_OUT_SHARE == HELD_OUT_SHARE - 1
    if tokens > 1 and not is_chosen.any():
        is_chosen[-1] = True
    return is_chosen
