"""Whether a fit is kept: by what it does to the worst domain of the held-out text."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

# Held-out tokens that judge a fit while it is under way.
JUDGED_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Relative errors of a block's routed output on held-out tokens.

    Attributes:
        overall: Of all of them.
        domains: By domain.
    """

    overall: float
    domains: Mapping[str, float]

    @classmethod
    def of(cls, wrong: Mapping[str, float], size: Mapping[str, float]) -> "Verdict":
        """Errors from sums of squares.

        Args:
            wrong: Squared error by domain.
            size: Squared output of the original block by domain.
        """
        return cls(
            overall=_share(sum(wrong.values()), sum(size.values())),
            domains={name: _share(wrong[name], size[name]) for name in wrong},
        )

    def worst(self, before: "Verdict") -> float:
        """Error after a fit over the error before it, of the domain where that is greatest; infinite without any.

        A fit that nothing judges, as a single calibration token leaves nothing for that, is never kept.
        """
        gains = (_gain(error, before.domains[name]) for name, error in self.domains.items())
        return max(gains, default=math.inf)


def _share(wrong: float, size: float) -> float:
    return math.sqrt(wrong / size) if size else 0.0


def _gain(after: float, before: float) -> float:
    if before:
        return after / before if math.isfinite(after) else math.inf
    return 1.0 if after == 0 else math.inf


def thinned(parts: Mapping[str, Tensor], most: int = JUDGED_TOKENS) -> dict[str, Tensor]:
    """Evenly spaced tokens of every domain, ``most`` or fewer in all."""
    every = max(1, -(-sum(map(len, parts.values())) // most))
    return {name: part[::every] for name, part in parts.items()}
