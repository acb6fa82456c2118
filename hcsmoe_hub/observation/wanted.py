"""Which statistics of a layer anything in force needs."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is observed of a layer besides what every report shows: usage, routing scores and saliency.

    Attributes:
        outputs: The mean output of every expert over all tokens, for which each of them runs on every token.
        products: The products of two experts' router-weighted outputs.
        logits: The products of two experts' router logits.
        sums: The sums of router weights and of output norms.
        sample: The inputs of the block for a sample of the tokens.
    """

    outputs: bool = True
    products: bool = True
    logits: bool = True
    sums: bool = True
    sample: bool = True
