"""How often greedy continuations end in a loop."""

from collections.abc import Sequence
from typing import Any

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.evaluation.records import TextRecord
from hcsmoe_hub.evaluation.scorer import Scorer
from hcsmoe_hub.evaluation.tokens import Tokens
from hcsmoe_hub.methods.quality.tally import DomainTally, by_domain, proportion_error

PROMPT_TOKENS, CONTINUATION_TOKENS = 32, 128
# Minimum tokens of a phrase, and minimum repetitions of it in a loop.
MIN_PHRASE, MIN_REPEATS = 2, 3
NGRAM = 4

# Domain and token ids of a prompt, or of a source that an encoder reads.
Prompt = tuple[str | None, list[int]]


def is_loop(ids: Sequence[int]) -> bool:
    """Whether a text ends with the same phrase, of at least two tokens, three times or more.

    This is the criterion of Holtzman et al., "The Curious Case of Neural Text Degeneration" (arXiv 1904.09751). The
    text may stop anywhere within the phrase, since every rotation of the phrase is repeated too.
    """
    for period in range(1, len(ids) // MIN_REPEATS + 1):
        span = MIN_REPEATS * max(period, MIN_PHRASE)
        end = ids[-span:]
        if len(end) == span and end[period:] == end[:-period]:
            return True
    return False


def repeated_ngrams(ids: Sequence[int], *, length: int = NGRAM) -> float:
    """Share of n-grams that occurred earlier in the text, ``1 - distinct n-grams / n-grams``; 0 without n-grams.

    seq-rep-n of Welleck et al., "Neural Text Generation with Unlikelihood Training" (arXiv 1908.04319).
    """
    ngrams = [tuple(ids[begin : begin + length]) for begin in range(len(ids) - length + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def choose_prompts(records: Sequence[TextRecord], tokens: Tokens, *, count: int) -> list[Prompt]:
    """Makes prompts of ``<bos>`` and the first tokens of records, evenly spaced among the long enough ones.

    Args:
        records: The text.
        tokens: Tokenizer of the model.
        count: Number of prompts.

    Raises:
        PlanError: If the text has fewer records that are long enough.
    """
    encoded = [(record.domain, tokens.encode(record.text)[:PROMPT_TOKENS]) for record in records]
    usable = [(domain, [tokens.first, *ids]) for domain, ids in encoded if len(ids) == PROMPT_TOKENS]
    if count > len(usable):
        raise PlanError(
            f"{count} prompts were requested, but only {len(usable)} of {len(records)} records have {PROMPT_TOKENS} "
            "tokens.",
            hint=f"use `generate={len(usable)}` or less" if usable else "pass longer texts",
        )
    return [usable[number * len(usable) // count] for number in range(count)]


def measure_loops(
    prompts: Sequence[Prompt], scorer: Scorer, *, last: int | None, begins: Sequence[Sequence[int]] = ()
) -> dict[str, Any]:
    """Continues prompts greedily and measures how often the continuations loop.

    Args:
        prompts: The prompts.
        scorer: The model to measure.
        last: Id that ends a text, ``None`` if there is none.
        begins: Of a model with an encoder, what its decoder has written already of each continuation.

    Returns:
        ``{"overall": {"loop_rate", "loop_rate_stderr", "repeated_4grams", "prompts"}, "domains": {...}}``; rates from
        0 to 1.
    """
    loops, repeated = DomainTally(), DomainTally()
    added = scorer.continuations([ids for _, ids in prompts], tokens=CONTINUATION_TOKENS, last=last, begins=begins)
    for (domain, _), ids in zip(prompts, added, strict=True):
        loops.add(domain, is_loop(ids), 1)
        repeated.add(domain, repeated_ngrams(ids), 1)
    table = by_domain(loop_rate=loops, repeated_4grams=repeated)
    for row in (table["overall"], *table["domains"].values()):
        count = row.pop("count")
        row |= {"loop_rate_stderr": proportion_error(row["loop_rate"], count), "prompts": count}
    return table
