"""What a model does on held-out text and questions, record by record, as ``hcsmoe evaluate`` measures it.

R records, Q questions, T predicted tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.evaluation.choices import best, choice_pairs, mean_log_likelihoods
from hcsmoe_hub.evaluation.loops import choose_prompts, measure_loops
from hcsmoe_hub.evaluation.options import DEFAULT_WINDOW
from hcsmoe_hub.evaluation.perplexity import Window, cut_windows
from hcsmoe_hub.evaluation.records import ChoiceItem, TextRecord, read_choices, read_texts
from hcsmoe_hub.evaluation.scorer import Request, Scorer
from hcsmoe_hub.evaluation.scorers import make_scorers
from hcsmoe_hub.evaluation.tokens import Tokens
from hcsmoe_hub.hub.open import open_source

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Scores:
    """The figures of one model.

    Attributes:
        losses: Sum of the negative log-likelihoods of each record's tokens in nats, ``[R]`` float64.
        tokens: Predicted tokens of each record, ``[R]`` int64.
        predictions: Most likely token at every position, in the order of the records, ``[T]`` int32.
        right: Whether each question was answered right, ``[Q]`` bool.
        loop_rate: Share of the greedy continuations that end in a loop; ``None`` if none was asked for.
    """

    losses: Array
    tokens: Array
    predictions: Array
    right: Array
    loop_rate: float | None

    def matches(self, other: "Scores") -> Array:
        """Tokens of each record whose most likely prediction is that of another model, ``[R]`` int64."""
        bounds = np.concatenate(([0], np.cumsum(self.tokens)))
        total = np.concatenate(([0], np.cumsum(self.predictions == other.predictions)))
        matches: Array = np.diff(total[bounds])
        return matches


class HeldOut:
    """Held-out text and questions.

    Args:
        text: File of ``{"text", "domain"}``.
        choices: File of questions; ``None`` for none.
        count: Evenly spaced records, and as many questions; ``None`` for all.
        loops: Prompts from the text to continue greedily.
        only: The only domain to take of these records, ``None`` for all.
    """

    def __init__(
        self, text: Path, choices: Path | None, *, count: int | None, loops: int = 0, only: str | None = None
    ) -> None:
        texts, items = read_texts(text)[0], read_choices(choices)[0] if choices else []
        self.records: list[TextRecord] = [
            record for record in spaced(texts, count) if only is None or record.domain == only
        ]
        self.items: list[ChoiceItem] = spaced(items, count)
        self._loops = loops

    @cached_property
    def domains(self) -> list[str]:
        """Domain of each record."""
        return [record.domain or "" for record in self.records]

    def score(self, model: Path) -> Scores:
        """Measures a checkpoint; every record and question runs through it once.

        Args:
            model: Folder of the checkpoint.
        """
        checkpoint = Checkpoint(open_source(str(model)))
        tokens = Tokens(checkpoint.source, vocab_size=checkpoint.vocab_size)
        (scorer,) = make_scorers([checkpoint], torch.device("cpu"), stream=False)
        windows = [cut_windows([record], tokens, window=DEFAULT_WINDOW) for record in self.records]
        losses, predictions = text_scores([window for found in windows for window in found], scorer)
        owners = np.repeat(np.arange(len(windows)), [len(found) for found in windows])
        lengths = np.array([len(found) for found in predictions])
        prompts = choose_prompts(self.records, tokens, count=self._loops)
        rate = measure_loops(prompts, scorer, last=tokens.last)["overall"]["loop_rate"] if prompts else None
        return Scores(
            losses=np.bincount(owners, losses, len(windows)),
            tokens=np.bincount(owners, lengths, len(windows)).astype(np.int64),
            predictions=np.concatenate(predictions),
            right=answers(self.items, tokens, scorer),
            loop_rate=rate,
        )


def spaced(things: list[Any], count: int | None) -> list[Any]:
    """Evenly spaced items; all if there are no more than that."""
    if count is None or count >= len(things):
        return things
    return [things[number * len(things) // count] for number in range(count)]


def text_scores(windows: Sequence[Window], scorer: Scorer) -> tuple[Array, list[Array]]:
    """Sum of the negative log-likelihoods of each window ``[W]`` float64, and its most likely tokens, int32."""
    losses, predictions = np.zeros(len(windows)), [np.zeros(0, np.int32)] * len(windows)
    for index, logits_SV in scorer.logits([Request(window.ids[:-1]) for window in windows]):
        targets_S = torch.tensor(windows[index].ids[1:])
        losses[index] = float(F.cross_entropy(logits_SV, targets_S, reduction="none").double().sum())
        predictions[index] = logits_SV.argmax(-1).numpy().astype(np.int32)
    return losses, predictions


def answers(items: Sequence[ChoiceItem], tokens: Tokens, scorer: Scorer) -> Array:
    """Whether each question is answered right, by the gain in mean log-likelihood that the context brings."""
    pairs = [choice_pairs(item, tokens) for item in items]
    every = [pair for choices in pairs for both in choices for pair in both]
    found = mean_log_likelihoods(every, scorer, advance=lambda: None)
    chosen = [best([found[conditional] - found[alone] for conditional, alone in choices]) for choices in pairs]
    return np.array([number == item.gold for number, item in zip(chosen, items, strict=True)], dtype=bool)
