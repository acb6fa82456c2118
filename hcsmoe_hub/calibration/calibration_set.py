"""The sequences that a conversion looks at, and those that it is measured on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CalibrationSet:
    """Packed sequences of equal length, each of one domain.

    Attributes:
        token_ids: ``[B, S]`` int64: experts are observed on them, and fitted to them.
        domains: Domain of each of them.
        measured_ids: ``[M, S]`` int64 of other documents: only what a conversion costs is measured on them. M may be 0.
        measured_domains: Domain of each of those; one that calibration has, too.
        sources: Index of the source of each calibration sequence; empty where there is only one source.
        source_length: Tokens of every sequence, the first ones, that go into an encoder; 0 for a decoder-only model.
        are_pairs: Whether these and the others are the source and the target of pairs, not a text and what was cut out
            of it.
    """

    token_ids: Tensor
    domains: tuple[str, ...]
    measured_ids: Tensor
    measured_domains: tuple[str, ...]
    sources: tuple[int, ...] = ()
    source_length: int = 0
    are_pairs: bool = False

    @classmethod
    def of(cls, token_ids: Tensor, domains: Sequence[str], source_length: int = 0) -> Self:
        """A set without sequences to measure on."""
        return cls(
            token_ids=token_ids,
            domains=tuple(domains),
            measured_ids=torch.empty(0, token_ids.shape[1], dtype=torch.int64),
            measured_domains=(),
            source_length=source_length,
        )
