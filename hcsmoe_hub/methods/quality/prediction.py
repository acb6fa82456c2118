"""Predicts what a whole model loses from what its layers lose one by one. P points, L layers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Numbers that are fitted.
COEFFICIENTS = 2


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
            The law; ``None`` where fewer points than numbers cost anything, or all of them have the same error.
        """
        points = [(error, ratio) for error, ratio in zip(errors, ratios, strict=True) if error > 0 and ratio > 1]
        if len({error for error, _ in points}) < COEFFICIENTS:
            return None
        inputs = np.log([error for error, _ in points])
        power, level = np.polyfit(inputs, np.log(np.log([ratio for _, ratio in points])), 1)
        return cls(scale=math.exp(level), power=float(power))

    def ratio(self, error: float) -> float:
        """The ratio at a mean error of the layers; 1 without any error."""
        return math.exp(self.scale * error**self.power) if error > 0 else 1.0


def leave_one_out(errors: Sequence[float], ratios: Sequence[float]) -> list[float | None]:
    """The ratio of every point as a law predicts it that is fitted to all the others.

    Args:
        errors: Mean error of the layers at every point.
        ratios: Measured ratio of every point.

    Returns:
        A ratio per point; ``None`` where the others are too few for a law.
    """
    found = []
    for number, error in enumerate(errors):
        others = [place for place in range(len(errors)) if place != number]
        law = RatioLaw.fit([errors[place] for place in others], [ratios[place] for place in others])
        found.append(None if law is None else law.ratio(error))
    return found


def excess_error(predicted: float, measured: float) -> float:
    """``|predicted - measured| / measured`` of what two ratios have above 1."""
    return abs(predicted - measured) / abs(measured - 1)
