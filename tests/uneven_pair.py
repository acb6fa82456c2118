"""A fit by two ranks, on one of which memory runs out, and tensors that they exchange in pieces."""

from typing import Any

import torch
from torch import Tensor

from hcsmoe_hub.machine import collectives, ranks
from hcsmoe_hub.methods.refit.down_projections import fit_down

EXPERTS, NEURONS, HIDDEN, TOKENS = 3, 4, 5, 64


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Sample:
    """What two experts per token do on some tokens.

    Args:
        part: The tokens.
        fails_at: Which evaluation of an expert finds no memory, from 1.
    """

    def __init__(self, part: slice, fails_at: int = 0) -> None:
        self.tokens_TH = normal(TOKENS, HIDDEN)[part]
        self.index_TK = normal(TOKENS, EXPERTS).topk(2).indices[part]
        self.weight_TK = torch.full(self.index_TK.shape, 0.5)
        self._weights = normal(EXPERTS, HIDDEN, NEURONS)
        self._left = fails_at

    def hidden(self, expert: int, inputs_RH: Tensor) -> Tensor:
        self._left -= 1
        if self._left == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return (inputs_RH @ self._weights[expert]).tanh()


def fitted(part: slice, fails_at: int = 0) -> Tensor:
    return fit_down(Sample(part, fails_at), normal(TOKENS, HIDDEN)[part], normal(EXPERTS, NEURONS, HIDDEN))


def fit_part(_source: str, failing: Any, listener: Any) -> Tensor:
    """The fit of a rank; on one of them memory runs out."""
    return fitted(ranks.block(TOKENS), fails_at=2 if ranks.number() == failing else 0)


def exchange_in_pieces(_source: str, piece: Any, listener: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A sum, the rows of both ranks, and the first rank's values; ranks exchange so many bytes at once."""
    whole, collectives.PIECE_BYTES = collectives.PIECE_BYTES, piece
    try:
        # Neither is contiguous; ranks hold different numbers of rows.
        summed = ranks.add_up((normal(7, 5) * (1 + ranks.number())).T)
        rows = ranks.joined(normal(9, 3)[ranks.block(9)].to(torch.bfloat16))
        own = (normal(4, 6) + ranks.number()).T
        ranks.settle({"own": own})
        return summed, rows, own
    finally:
        collectives.PIECE_BYTES = whole
