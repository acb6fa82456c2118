"""Ratios of perplexities with intervals, and differences of accuracies with standard errors.

All are paired: the same records and questions for both models. R records, Q questions, B bootstrap samples.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
SAMPLES, SEED, LEVEL = 2000, 0, 0.95


class Ratio(NamedTuple):
    """A ratio of perplexities and its 95 % interval."""

    ratio: float
    low: float
    high: float


class Change(NamedTuple):
    """A difference of accuracies and its standard error."""

    change: float
    error: float


def ratio(losses: Array, source_losses: Array, tokens: Array) -> Ratio:
    """Perplexity of a result over that of its source, with an interval by bootstrap over records.

    Args:
        losses: Sums of negative log-likelihoods of the result, ``[R]``.
        source_losses: Those of the source, ``[R]``.
        tokens: Tokens of each record, ``[R]``.
    """
    worse = losses - source_losses
    drawn_BR = np.random.default_rng(SEED).multinomial(len(worse), np.full(len(worse), 1 / len(worse)), SAMPLES)
    sampled_B = np.exp((drawn_BR @ worse) / (drawn_BR @ tokens))
    low, high = np.quantile(sampled_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Ratio(float(np.exp(worse.sum() / tokens.sum())), float(low), float(high))


def change(right: Array, other: Array) -> Change:
    """Accuracy of a result minus that of another model on the same questions.

    Args:
        right: Whether the result answers each question, or the share of the seeds with which it does, ``[Q]``.
        other: The same of the other model, ``[Q]``.
    """
    differences_Q = np.asarray(right, float) - np.asarray(other, float)
    return Change(float(differences_Q.mean()), float(differences_Q.std(ddof=1) / np.sqrt(len(differences_Q))))
