"""Multiple choice by length-normalised log-likelihood. S positions, V vocabulary."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from hcsmoe_hub.evaluation.records import ChoiceItem
from hcsmoe_hub.evaluation.scorer import Request, Scorer
from hcsmoe_hub.evaluation.tokens import Tokens
from hcsmoe_hub.methods.quality.tally import DomainTally, by_domain, proportion_error

# Token ids before a choice, or of what an encoder reads, and token ids of the choice.
Scored = tuple[tuple[int, ...], tuple[int, ...]]


def choice_pairs(item: ChoiceItem, tokens: Tokens) -> list[tuple[Scored, Scored]]:
    """Every choice of an item after ``<bos> + context``, and after ``<bos>`` alone, each as a pair."""
    alone = (tokens.first,)
    context = (*alone, *tokens.encode(item.context))
    return [((context, ids), (alone, ids)) for ids in (tuple(tokens.encode(text)) for text in item.choices)]


def mean_log_likelihoods(
    pairs: Sequence[Scored], scorer: Scorer, *, advance: Callable[[], None]
) -> dict[Scored, float]:
    """Mean log-likelihood of the tokens of each choice, in nats; equal pairs are computed once."""
    distinct = list(dict.fromkeys(pairs))
    has_encoder = scorer.checkpoint.has_encoder
    requests = [
        Request(choice, source=before) if has_encoder else Request((*before, *choice)[:-1], len(before) - 1)
        for before, choice in distinct
    ]
    found = {}
    for index, logits_SV in scorer.logits(requests):
        targets_S = torch.tensor(distinct[index][1])
        log_probs_S = F.log_softmax(logits_SV, dim=-1).gather(1, targets_S[:, None])
        found[distinct[index]] = float(log_probs_S.double().mean())
        advance()
    return found


def best(scores: Sequence[float]) -> int:
    """Index of the highest score; the lowest index among equal scores."""
    return max(range(len(scores)), key=lambda index: scores[index])


def measure_choices(
    items: Sequence[ChoiceItem],
    pairs: Sequence[Sequence[tuple[Scored, Scored]]],
    scorer: Scorer,
    *,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Accuracy, overall and per domain.

    The score of a choice is its mean token log-likelihood after ``<bos> + context`` minus that after ``<bos>`` alone,
    which is their pointwise mutual information per token; ``plain_accuracy`` omits the second term. An encoder reads
    the context, or an empty source.

    Args:
        items: The questions.
        pairs: The result of ``choice_pairs`` for each question.
        scorer: The model to measure.
        advance: Called after each distinct sequence.

    Returns:
        ``{"overall": {"accuracy", "accuracy_stderr", "plain_accuracy", "plain_accuracy_stderr", "items"}, "domains":
        {...}}``; accuracies from 0 to 1.
    """
    found = mean_log_likelihoods(
        [pair for choices in pairs for both in choices for pair in both], scorer, advance=advance
    )
    accuracy, plain = DomainTally(), DomainTally()
    for item, choices in zip(items, pairs, strict=True):
        informed = best([found[conditional] - found[alone] for conditional, alone in choices])
        accuracy.add(item.domain, informed == item.gold, 1)
        plain.add(item.domain, best([found[conditional] for conditional, _ in choices]) == item.gold, 1)
    table = by_domain(accuracy=accuracy, plain_accuracy=plain)
    return {"overall": _row(table["overall"]), "domains": {name: _row(row) for name, row in table["domains"].items()}}


def _row(found: dict[str, Any]) -> dict[str, Any]:
    count = found["count"]
    row: dict[str, Any] = {}
    for name in ("accuracy", "plain_accuracy"):
        row |= {name: found[name], f"{name}_stderr": proportion_error(found[name], count)}
    return {**row, "items": count}
