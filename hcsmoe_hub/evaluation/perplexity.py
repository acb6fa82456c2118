"""Perplexity of a text, and agreement of a model with its base on it.

S positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from hcsmoe_hub.errors import VerificationError
from hcsmoe_hub.evaluation.records import TextRecord
from hcsmoe_hub.evaluation.scorer import Request, Scorer
from hcsmoe_hub.evaluation.tokens import Tokens
from hcsmoe_hub.methods.quality.agreement import Agreement
from hcsmoe_hub.methods.quality.perplexity import GREATEST_LOSS, Perplexity
from hcsmoe_hub.model.sequences import predicted_tokens


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a document: every id but the first is predicted from the ids before it; targets of a source, all.

    Attributes:
        domain: Domain of the document.
        ids: Between 2 and window + 1 token ids; of a source, those of its target.
        source: What an encoder reads; empty for a model without one.
    """

    domain: str | None
    ids: Sequence[int]
    source: Sequence[int] = ()

    @property
    def labels(self) -> Tensor:
        """The ids that are predicted, ``[S]`` int64."""
        return predicted_tokens(torch.tensor([[*self.source, *self.ids]]), len(self.source))[0]

    @property
    def request(self) -> Request:
        """What a model is asked for: logits for every label."""
        return Request(self.ids, source=self.source) if self.source else Request(self.ids[:-1])


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

    Raises:
        VerificationError: If the predictions of one are not finite, or too bad for a float to hold the perplexity.
    """
    requests = [window.request for window in windows]
    ours, theirs, agreement = Perplexity(), Perplexity(), Agreement()
    # Both process the windows in the same order, which depends only on their lengths.
    reference = None if base is None else base.logits(requests)
    for index, logits_SV in model.logits(requests):
        window = windows[index]
        targets_S = window.labels
        ours.add(window.domain, logits_SV, targets_S)
        if reference is not None:
            same, base_logits_SV = next(reference)
            assert same == index, "both scorers sort by length"
            theirs.add(window.domain, base_logits_SV, targets_S)
            agreement.add(window.domain, logits_SV, base_logits_SV)
        advance()
    compared = base is not None
    _check_finite("the model", ours)
    if compared:
        _check_finite("its base", theirs)
    return {
        "model": ours.figures(),
        "base": theirs.figures() if compared else None,
        "agreement": agreement.figures() if compared else None,
    }


def _check_finite(subject: str, measured: Perplexity) -> None:
    """Checks that figures can be computed of all predictions of a model."""
    losses = [tally.mean for tally in (measured.losses.overall, *measured.losses.domains.values())]
    if not all(isfinite(loss) and loss < GREATEST_LOSS for loss in losses):
        raise VerificationError(
            f"the predictions of {subject} are not finite numbers, so they have no perplexity.",
            hint="run 'hcsmoe verify' on it, which names a tensor that is not finite",
        )
