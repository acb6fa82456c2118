"""Which calibration tokens a fit never sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from hcsmoe_hub.machine import ranks

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
        return torch.cat([self.fitted[:0], *self.held_out.values()]).sort().values


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnTokens:
    """Which of the tokens of all ranks this one holds: a stretch of them.

    Attributes:
        start: Number of its first token among those of all ranks.
        count: How many it holds.
        total: How many all ranks hold.
    """

    start: int
    count: int
    total: int

    @classmethod
    def of(cls, count: int, device: torch.device) -> Self:
        """The place of so many tokens of this rank; all of them in a single process.

        Args:
            count: How many it holds.
            device: Through which ranks find out about each other.
        """
        start, total = ranks.place(count, device)
        return cls(start=start, count=count, total=total)

    def part(self, tokens: Tensor) -> Tensor:
        """Those of some tokens that this rank holds, numbered from its first one.

        Args:
            tokens: Numbers among the tokens of all ranks, int64 on the CPU.
        """
        if self.count == self.total:
            return tokens
        return tokens[(tokens >= self.start) & (tokens < self.start + self.count)] - self.start


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
