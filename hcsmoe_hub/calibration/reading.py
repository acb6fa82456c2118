"""What is read of the sources of a calibration set, and how it is cut into sequences."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hcsmoe_hub.calibration.domain_text import DomainText
from hcsmoe_hub.calibration.encode import Encoder
from hcsmoe_hub.calibration.source_text import Item


@dataclass(frozen=True, slots=True)
class Reading:
    """One source.

    Attributes:
        items: Its documents, in shuffled order.
        encoder: Turns them into token ids.
    """

    items: Iterator[Item]
    encoder: Encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All sources.

    Attributes:
        readings: What is read of each.
        cut: A text without documents, cut as all of them are.
        source_length: Tokens of every sequence that go into an encoder; 0 for a decoder-only model.
        are_pairs: Whether the sources hold pairs.
    """

    readings: Sequence[Reading]
    cut: DomainText
    source_length: int
    are_pairs: bool = False
