"""Span corruption, the task that T5 was pretrained on: predict the spans of a text that were cut out of it.

The procedure is that of Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer" (JMLR 2020, arXiv 1910.10683), section 3.3.4: 15 % of the tokens are noise, in spans of 3 tokens on
average. Each span is replaced by a sentinel; the targets are the sentinels, each followed by the tokens of its span.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# Parts per hundred, as whole numbers do not round in binary.
NOISE_PERCENT = 15
MEAN_SPAN = 3
# Fewest tokens of which some are noise and some are not.
LEAST_TOKENS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Corruption:
    """How a piece of text is corrupted.

    Attributes:
        tokens: Tokens of the piece.
        noise: How many of them are cut out.
        spans: Number of spans that they are cut out in, each with a sentinel of its own.
    """

    tokens: int
    noise: int
    spans: int

    @property
    def source_length(self) -> int:
        """Tokens of the input: the rest of the text, the sentinels, and the end token."""
        return self.tokens - self.noise + self.spans + 1

    @property
    def target_length(self) -> int:
        """Tokens of the target: the noise, the sentinels, and the end token."""
        return self.noise + self.spans + 1


def corruption_of(tokens: int) -> Corruption:
    """How T5 corrupts a piece of text.

    Args:
        tokens: Tokens of the piece, at least ``LEAST_TOKENS``.
    """
    noise = min(max(_rounded(tokens * NOISE_PERCENT, 100), 1), tokens - 1)
    spans = min(max(_rounded(noise, MEAN_SPAN), 1), tokens - noise)
    return Corruption(tokens=tokens, noise=noise, spans=spans)


def _rounded(numerator: int, denominator: int) -> int:
    """The nearest whole number, halves to the even one, as T5 rounds."""
    return round(numerator / denominator)


def corruption_to(length: int) -> Corruption | None:
    """The corruption whose input and target fill a sequence exactly; ``None`` if no text is short enough.

    One more token of text can add a span, which adds two sentinels. Where T5's own numbers would leave one or two
    tokens of the sequence free, the text is that much longer, and its number of spans stays.

    Args:
        length: Tokens of input and target together.
    """
    tokens = length - 4
    while tokens >= LEAST_TOKENS:
        found = corruption_of(tokens)
        missing = length - found.source_length - found.target_length
        if missing >= 0:
            noise = corruption_of(tokens + missing).noise
            return Corruption(tokens=tokens + missing, noise=noise, spans=found.spans)
        tokens -= 1
    return None


def corrupt(
    ids: Sequence[int], corruption: Corruption, *, sentinels: Sequence[int], end: int, seed: int
) -> tuple[list[int], list[int]]:
    """Cuts spans out of a text. The same text and seed always give the same spans.

    Args:
        ids: Token ids of the text, as many as the corruption says.
        corruption: How it is corrupted.
        sentinels: Ids that stand for the spans, in order; at least as many as there are spans.
        end: Id that ends the input and the target.
        seed: Chooses the spans.

    Returns:
        Token ids of the input and of the target.
    """
    content = hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()
    chance = random.Random(f"{seed}:{content}")
    kept_lengths = _segments(corruption.tokens - corruption.noise, corruption.spans, chance)
    noise_lengths = _segments(corruption.noise, corruption.spans, chance)
    source, target, place = list[int](), list[int](), 0
    for sentinel, kept, noise in zip(sentinels, kept_lengths, noise_lengths, strict=False):
        source += [*ids[place : place + kept], sentinel]
        target += [sentinel, *ids[place + kept : place + kept + noise]]
        place += kept + noise
    return [*source, end], [*target, end]


def _segments(items: int, parts: int, chance: random.Random) -> list[int]:
    """Lengths of parts of at least one item each; every division is equally likely."""
    bounds = [0, *sorted(chance.sample(range(1, items), parts - 1)), items]
    return [last - first for first, last in pairwise(bounds)]
