"""Means over tokens or items, overall and per domain."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Figure = Mapping[str, Any]


@dataclass(slots=True)
class Tally:
    """Sums and counts of a quantity.

    Attributes:
        total: Sum, in float64; a tensor where summands are, so that nothing waits for an accelerator before the end.
        count: Number of summands.
    """

    total: float | Tensor = 0.0
    count: int = 0

    @property
    def mean(self) -> float:
        """Their mean."""
        return float(self.total) / self.count


@dataclass(slots=True)
class DomainTally:
    """One tally overall, and one per domain; records without a domain count only overall."""

    overall: Tally = field(default_factory=Tally)
    domains: dict[str, Tally] = field(default_factory=dict)

    def add(self, domain: str | None, total: float | Tensor, count: int) -> None:
        """Adds a sum of ``count`` summands, a tensor in float64."""
        tallies = [self.overall]
        if domain is not None:
            tallies.append(self.domains.setdefault(domain, Tally()))
        for tally in tallies:
            tally.total = tally.total + total
            tally.count += count

    @classmethod
    def sum_of(cls, parts: Iterable["DomainTally"]) -> "DomainTally":
        """One tally of the records of several, its totals on the host."""
        whole = cls()
        for part in parts:
            for domain, tally in part.domains.items():
                found = whole.domains.setdefault(domain, Tally())
                found.total, found.count = float(found.total) + float(tally.total), found.count + tally.count
            whole.add(None, float(part.overall.total), part.overall.count)
        return whole

    def means(self) -> tuple[Tally, dict[str, Tally]]:
        """Overall, and by domain in alphabetical order."""
        return self.overall, dict(sorted(self.domains.items()))


def by_domain(**columns: DomainTally) -> dict[str, Any]:
    """A table of the means of several quantities, all added for the same records.

    Returns:
        ``{"overall": {name: mean, ..., "count": n}, "domains": {domain: the same}}``.
    """
    first = next(iter(columns.values()))

    def row(domain: str | None) -> dict[str, Any]:
        tallies = {name: tally.overall if domain is None else tally.domains[domain] for name, tally in columns.items()}
        counts = {tally.count for tally in tallies.values()}
        assert len(counts) == 1, "all quantities of a table must be added for the same records"
        return {name: tally.mean for name, tally in tallies.items()} | {"count": counts.pop()}

    return {"overall": row(None), "domains": {domain: row(domain) for domain in sorted(first.domains)}}


def proportion_error(share: float, count: int) -> float | None:
    """Standard error of a proportion of ``count`` items, from the sample variance; ``None`` for a single item."""
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
