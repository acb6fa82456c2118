"""Orders sequences so that every beginning of a set has the shares of its parts."""

from collections.abc import Sequence


def interleave(shares: Sequence[float], sequences: int, limits: Sequence[int] | None = None) -> list[int]:
    """The part that each sequence is taken from, as an index into ``shares``.

    Parts alternate so that every beginning has their shares as closely as whole sequences allow. Without limits, a
    longer order begins like a shorter one.

    Args:
        shares: Share of each part; they sum to 1.
        sequences: Number of sequences.
        limits: The most sequences that each part has; ``None`` for no limit. The order is shorter where all parts
            reach theirs.
    """
    counts, order = [0] * len(shares), list[int]()
    for number in range(1, sequences + 1):
        open_parts = [part for part in range(len(shares)) if limits is None or counts[part] < limits[part]]
        if not open_parts:
            break
        lacks = [share * number - count for share, count in zip(shares, counts, strict=True)]
        chosen = max(open_parts, key=lacks.__getitem__)
        counts[chosen] += 1
        order.append(chosen)
    return order


def interleave_counts(counts: Sequence[int]) -> list[int]:
    """The part that each sequence is taken from, where every part gives a known number of them."""
    total = sum(counts)
    return interleave([count / max(1, total) for count in counts], total, counts)


def spread(counts: Sequence[int], sequences: int, limits: Sequence[int] | None = None) -> list[int]:
    """Splits a number of sequences over parts in proportion to their counts.

    Args:
        counts: Size of each part.
        sequences: Number to split.
        limits: The most that each part takes; ``None`` for no limit.
    """
    order = interleave([count / max(1, sum(counts)) for count in counts], sequences, limits)
    return [order.count(part) for part in range(len(counts))]
