"""Predicts what a whole model loses from what its layers lose one by one. P points, L layers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Numbers that are fitted.
COEFFICIENTS = 2
# Perplexity cannot sensibly grow by more: vocabularies are smaller, and a uniform guess over one does no worse.
LARGEST_RATIO = 1e6
# Of the logarithm of a scale: numbers beyond it leave the range of float64.
LARGEST_LEVEL = 700


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioLaw:
    """``log(ratio) = scale * (mean error of the layers) ** power``, of perplexities.

    Attributes:
        scale: Fitted to measured points.
        power: Fitted to measured points.
    """

    scale: float
    power: float

    @classmethod
    def fit(cls, errors: Sequence[float], ratios: Sequence[float]) -> "RatioLaw | None":
        """Least squares of the logarithms of both sides, so that relative errors of small losses count as well.

        Args:
            errors: Mean error of the layers at every point.
            ratios: Measured ratio of every point.

        Returns:
            The law; ``None`` where fewer points than numbers cost anything, or their errors are all the same or so
            alike that no sensible law fits.
        """
        points = [(error, ratio) for error, ratio in zip(errors, ratios, strict=True) if error > 0 and ratio > 1]
        if len({error for error, _ in points}) < COEFFICIENTS:
            return None
        inputs = np.log([error for error, _ in points])
        power, level = np.polyfit(inputs, np.log(np.log([ratio for _, ratio in points])), 1)
        if abs(level) > LARGEST_LEVEL:
            return None
        return cls(scale=math.exp(level), power=float(power))

    def ratio(self, error: float) -> float | None:
        """The ratio at a mean error of the layers: 1 without any error, ``None`` where it would exceed a million."""
        if error <= 0:
            return 1.0
        # In logarithms, as the power may be large where the fitted points are close together.
        level = math.log(self.scale) + self.power * math.log(error)
        return math.exp(math.exp(level)) if level <= math.log(math.log(LARGEST_RATIO)) else None


def leave_one_out(errors: Sequence[float], ratios: Sequence[float]) -> list[float | None]:
    """The ratio of every point as a law predicts it that is fitted to all the others.

    Args:
        errors: Mean error of the layers at every point.
        ratios: Measured ratio of every point.

    Returns:
        A ratio per point; ``None`` where the others are too few for a law, or theirs predicts nothing sensible.
    """
    found: list[float | None] = []
    for number, error in enumerate(errors):
        others = [place for place in range(len(errors)) if place != number]
        law = RatioLaw.fit([errors[place] for place in others], [ratios[place] for place in others])
        found.append(None if law is None else law.ratio(error))
    return found


def excess_error(predicted: float, measured: float) -> float:
    """``|predicted - measured| / measured`` of what two ratios have above 1."""
    return abs(predicted - measured) / abs(measured - 1)
