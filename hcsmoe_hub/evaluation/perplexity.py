"""Perplexity of a text, and agreement of a model with its base on it.

S positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hcsmoe_hub.evaluation.records import TextRecord
from hcsmoe_hub.evaluation.scorer import Request, Scorer
from hcsmoe_hub.evaluation.tokens import Tokens
from hcsmoe_hub.methods.quality.agreement import Agreement
from hcsmoe_hub.methods.quality.perplexity import Perplexity


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a document: every id but the first is predicted from the ids before it.

    Attributes:
        domain: Domain of the document.
        ids: Between 2 and window + 1 token ids.
    """

    domain: str | None
    ids: Sequence[int]


def cut_windows(records: Sequence[TextRecord], tokens: Tokens, *, window: int) -> list[Window]:
    """Cuts ``<bos> + text`` of each record into windows that overlap by one token.

    Every token but ``<bos>`` is predicted exactly once, with at most ``window`` tokens of context.

    Args:
        records: The documents.
        tokens: Tokenizer of the model.
        window: Tokens that are predicted at once.
    """
    windows = []
    for record in records:
        ids = [tokens.first, *tokens.encode(record.text)]
        windows += [Window(record.domain, ids[begin : begin + window + 1]) for begin in range(0, len(ids) - 1, window)]
    return windows


def measure_text(
    windows: Sequence[Window], model: Scorer, base: Scorer | None, *, advance: Callable[[], None]
) -> dict[str, Any]:
    """Measures perplexity, and with a base also its perplexity and the agreement, in one pass over the windows.

    Args:
        windows: The text.
        model: The model to measure.
        base: The model to compare with.
        advance: Called after each window.

    Returns:
        ``{"model": perplexity, "base": perplexity or None, "agreement": figures or None}``.
    """
    requests = [Request(window.ids[:-1]) for window in windows]
    ours, theirs, agreement = Perplexity(), Perplexity(), Agreement()
    # Both process the windows in the same order, which depends only on their lengths.
    reference = None if base is None else base.logits(requests)
    for index, logits_SV in model.logits(requests):
        window = windows[index]
        targets_S = _targets(window)
        ours.add(window.domain, logits_SV, targets_S)
        if reference is not None:
            same, base_logits_SV = next(reference)
            assert same == index, "both scorers sort by length"
            theirs.add(window.domain, base_logits_SV, targets_S)
            agreement.add(window.domain, logits_SV, base_logits_SV)
        advance()
    compared = base is not None
    return {
        "model": ours.figures(),
        "base": theirs.figures() if compared else None,
        "agreement": agreement.figures() if compared else None,
    }


def _targets(window: Window) -> Tensor:
    return torch.tensor(window.ids[1:])
