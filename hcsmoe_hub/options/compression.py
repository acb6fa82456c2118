"""How much of every expert matrix a compression keeps: the rank of its factors, and rows that stay whole."""

import re
from dataclasses import dataclass
from typing import Annotated, Self

from hcsmoe_hub.options.checks import WrongValue

_FORM = re.compile(r"\s*(\d+)\s*(%?)\s*(?:,\s*(\d+(?:\.\d+)?)\s*(%?)\s*)?")
# Digits of a share that are kept: 33.3% is 0.333.
_DIGITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """The setting of ``compress``.

    Attributes:
        rank: Rank of the factors; ``None`` if it is a share.
        rank_share: Rank of the factors as a share of a matrix's smaller side; ``None`` if it is a number.
        sparsity: Share of rows (output neurons; columns in the notation of MC-SMoE) that the sparse part loses;
            ``None`` for a low-rank part alone.
    """

    rank: int | None = None
    rank_share: float | None = None
    sparsity: float | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads ``RANK[,SPARSITY]``: ``32``, ``25%``, ``32,0.9`` or ``32,90%``.

        Raises:
            WrongValue: If it is something else, or a number is out of range.
        """
        match = _FORM.fullmatch(text)
        if match is None:
            raise WrongValue(
                f"'{text}' is not a compression; write a rank and, if some rows stay whole, the share of rows that do "
                "not, such as 32 or 25%,90%."
            )
        number, percent, share, share_percent = match.groups()
        rank = int(number)
        if not rank or (percent and rank > 100):
            allowed = "from 1% to 100%" if percent else "1 or more"
            raise WrongValue(f"the rank {number}{percent} is out of range; it must be {allowed}.")
        sparsity = None
        if share is not None:
            sparsity = round(float(share) / (100 if share_percent else 1), _DIGITS)
            if not 0 < sparsity < 1:
                raise WrongValue(
                    f"the sparsity {share}{share_percent} is out of range; it must be above 0 and below 1, or 100%."
                )
        if percent:
            return cls(rank_share=rank / 100, sparsity=sparsity)
        return cls(rank=rank, sparsity=sparsity)

    def __str__(self) -> str:
        rank = str(self.rank) if self.rank is not None else f"{round(100 * (self.rank_share or 0))}%"
        return rank if self.sparsity is None else f"{rank},{self.sparsity:g}"

    def rank_of(self, smaller_side: int) -> int:
        """The rank of the factors of a matrix.

        Args:
            smaller_side: The smaller number of its rows and columns.
        """
        return self.rank if self.rank is not None else max(1, round((self.rank_share or 0) * smaller_side))

    def rows_of(self, rows: int) -> int:
        """Rows of a matrix that stay whole.

        Args:
            rows: How many it has.
        """
        return 0 if self.sparsity is None else rows - round(self.sparsity * rows)


def read_compression(text: str) -> str:
    """Checks a compression and writes it as ``32,0.9`` or ``25%``.

    Raises:
        WrongValue: If it is not one.
    """
    return str(Compression.parse(text))


CompressionText = Annotated[str, read_compression]
