"""The documents of one domain as sequences for models with an encoder and a decoder.

A sequence of N tokens is S of the source, then T of the target. Nothing is padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from hcsmoe_hub.calibration.denoising import Corruption, corrupt
from hcsmoe_hub.calibration.domain_text import DomainText, TokenIds
from hcsmoe_hub.calibration.pair_tokens import PairIds


class PairText(DomainText):
    """Pairs of one domain, put one after another until both sides of a sequence are full, then cut.

    Args:
        name: What the records call the domain.
        lengths: S and T.
        documents: The first pairs.
    """

    def __init__(self, name: str, lengths: tuple[int, int], documents: Sequence[TokenIds] = ()) -> None:
        self.lengths = lengths
        # Sequences that are full, and tokens of both sides of the next one.
        self._full, self._source, self._target = 0, 0, 0
        super().__init__(name, sum(lengths), documents)

    def like(self, name: str, documents: Sequence[TokenIds] = ()) -> Self:
        return type(self)(name, self.lengths, documents)

    @property
    def sequences(self) -> int:
        return self._full

    @property
    def wanted(self) -> str:
        return f"one sequence of {self.lengths[0]} of the source and {self.lengths[1]} of the target"

    def add(self, ids: TokenIds) -> None:
        super().add(ids)
        source, target = _lengths(ids)
        self._source, self._target = self._source + source, self._target + target
        if self._source >= self.lengths[0] and self._target >= self.lengths[1]:
            self._full, self._source, self._target = self._full + 1, 0, 0

    def pack(self, sequences: int) -> Tensor:
        packed, source, target = list[TokenIds](), TokenIds(), TokenIds()
        for document in self.documents:
            if len(packed) == sequences:
                break
            assert isinstance(document, PairIds), "only pairs are added"
            source, target = source + document.source, target + document.target
            if len(source) >= self.lengths[0] and len(target) >= self.lengths[1]:
                packed.append(source[: self.lengths[0]] + target[: self.lengths[1]])
                source, target = [], []
        return torch.tensor(packed, dtype=torch.int64).view(sequences, self.length)

    def touched(self, sequences: int) -> int:
        found = self.like("")
        for number, document in enumerate(self.documents):
            if found.sequences >= sequences:
                return number
            found.add(document)
        return len(self.documents)

    def last(self, documents: Sequence[TokenIds], sequences: int) -> int:
        first, source, target = len(documents), 0, 0
        while first and (source < sequences * self.lengths[0] or target < sequences * self.lengths[1]):
            first -= 1
            sides = _lengths(documents[first])
            source, target = source + sides[0], target + sides[1]
        return first


def _lengths(ids: TokenIds) -> tuple[int, int]:
    assert isinstance(ids, PairIds), "only pairs are added"
    return ids.split, len(ids) - ids.split


@dataclass(frozen=True, slots=True, kw_only=True)
class Denoiser:
    """How pieces of text become sources and targets.

    Attributes:
        corruption: How each piece is corrupted.
        sentinels: Ids that stand for the spans, in order.
        end: Id that ends source and target.
        seed: Chooses the spans.
    """

    corruption: Corruption
    sentinels: Sequence[int]
    end: int
    seed: int


class DenoisedText(DomainText):
    """Text of one domain, joined, cut into pieces and corrupted as T5 was pretrained.

    Args:
        name: What the records call the domain.
        denoiser: How each piece becomes a sequence.
        documents: Token ids of the first documents.
    """

    def __init__(self, name: str, denoiser: Denoiser, documents: Sequence[TokenIds] = ()) -> None:
        self.denoiser = denoiser
        super().__init__(name, denoiser.corruption.tokens, documents)

    def like(self, name: str, documents: Sequence[TokenIds] = ()) -> Self:
        return type(self)(name, self.denoiser, documents)

    def pack(self, sequences: int) -> Tensor:
        how = self.denoiser
        rows = [
            corrupt(piece, how.corruption, sentinels=how.sentinels, end=how.end, seed=how.seed)
            for piece in super().pack(sequences).tolist()
        ]
        length = how.corruption.source_length + how.corruption.target_length
        return torch.tensor([source + target for source, target in rows], dtype=torch.int64).view(sequences, length)
