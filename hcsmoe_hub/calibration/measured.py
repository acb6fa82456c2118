"""Chooses the sequences that a conversion is measured on: documents that calibration does not see."""

from collections.abc import Sequence
from dataclasses import dataclass

from hcsmoe_hub.calibration.domain_text import DomainText, key_of
from hcsmoe_hub.calibration.shares import spread
from hcsmoe_hub.calibration.source_text import SourceText

# Tokens of all measured sequences, unless more domains than that want one each; never more than calibrate.
MEASURED_TOKENS = 16_384
MOST_DOMAINS = 16
# Fewer sequences than these are all needed for calibration.
_FEWEST = 4
HELD_BACK = 1 / 8


@dataclass(slots=True, kw_only=True)
class Part:
    """One domain of a calibration set.

    Attributes:
        domain: Name that no other part has.
        source: Index of its source.
        text: Its documents.
        count: Number of sequences to calibrate on.
        rest: Documents to measure on.
        measured: Number of sequences to measure on.
    """

    domain: str
    source: int
    text: DomainText
    count: int
    rest: DomainText
    measured: int = 0


def find_measured(parts: Sequence[Part], sources: Sequence[SourceText]) -> None:
    """Reads on for text that calibration does not need, and measures on that.

    Args:
        parts: The domains; their ``rest`` and ``measured`` are set.
        sources: The sources, which are read further.
    """
    known = {key_of(document) for part in parts for document in part.text.documents[: part.text.touched(part.count)]}
    for part in parts:
        unused = part.text.documents[part.text.touched(part.count) :]
        part.rest = part.text.like(part.text.name, [one for one in unused if key_of(one) not in known])
    wanted = _wanted(parts)
    for index, source in enumerate(sources):
        own = [number for number, part in enumerate(parts) if part.source == index and wanted[number]]
        source.read_rest(
            {parts[number].text.name: parts[number].rest for number in own},
            {parts[number].text.name: wanted[number] for number in own},
            known,
        )
    for part, count in zip(parts, wanted, strict=True):
        part.measured = min(count, part.rest.sequences)


def _wanted(parts: Sequence[Part]) -> list[int]:
    """Sequences to measure on of every domain: at least one, or none of those beyond the largest."""
    counts = [part.count for part in parts]
    largest = sorted(range(len(parts)), key=lambda number: -counts[number])[:MOST_DOMAINS]
    sequences = max(1, min(MEASURED_TOKENS // parts[0].text.length, sum(counts)))
    shares = spread([counts[number] for number in largest], sequences)
    wanted = [0] * len(parts)
    for number, share in zip(largest, shares, strict=True):
        wanted[number] = max(1, share)
    return wanted


def hold_back(parts: Sequence[Part], share: float = HELD_BACK) -> None:
    """Takes about the last eighth of the sequences from calibration where a domain has no other text to measure on.

    A document is never on both sides: calibration ends before the first document that is held back. Where documents are
    so long that a domain would lose much more than an eighth, it is not measured, unless that leaves none at all.

    Args:
        parts: The domains; where one has nothing to measure on, its ``count``, ``rest`` and ``measured`` are set.
        share: What to take in place of an eighth.
    """
    lacking = [part for part in parts if not part.measured]
    counts = [part.count for part in lacking]
    if not lacking or sum(part.count for part in parts) < _FEWEST:
        return
    shares = spread(counts, max(1, int(sum(counts) * share)), [count - 1 for count in counts])
    found = [(part, share, _last_documents(part, share)) for part, share in zip(lacking, shares, strict=True) if share]
    chosen = [(part, held) for part, share, held in found if held.rest.sequences and held.lost <= 2 * share]
    if not chosen and not any(part.measured for part in parts):
        others = [(part, held) for part, _, held in found if held.rest.sequences and 2 * held.lost <= part.count]
        chosen = sorted(others, key=lambda other: other[1].lost)[:1]
    for part, held in chosen:
        part.measured = min(held.lost, held.rest.sequences)
        part.count, part.rest = part.count - held.lost, held.rest


@dataclass(frozen=True, slots=True)
class _Held:
    """The last documents of a domain, and how many sequences calibration loses with them."""

    rest: DomainText
    lost: int


def _last_documents(part: Part, sequences: int) -> _Held:
    """The last documents of a domain that fill a number of sequences, without those that calibration has as well."""
    documents = part.text.documents[: part.text.touched(part.count)]
    first = part.text.last(documents, sequences)
    kept = part.text.like(part.text.name, documents[:first]).sequences
    known = {key_of(one) for one in documents[:first]}
    rest = part.text.like(part.text.name, [one for one in documents[first:] if key_of(one) not in known])
    return _Held(rest, part.count - kept)
