"""Scores a result on held-out text. M held-out sequences of L tokens, B of them in a batch, T logits of each."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hcsmoe_hub.machine import ranks
from hcsmoe_hub.methods.distil.losses import text_loss
from hcsmoe_hub.methods.distil.training import Model
from hcsmoe_hub.methods.quality.perplexity import GREATEST_LOSS
from hcsmoe_hub.recovery.teacher import Teacher, divergence_from
from hcsmoe_hub.recovery.text import RecoveryText
from hcsmoe_hub.report import RecoveryScore


class Scorer:
    """Runs a model over held-out text; in a process group, each rank over its share of it.

    Args:
        student: Forward pass of the model.
        module: The model, which is not in training mode while it is scored.
        text: Its ``held_out_ML`` is scored.
        batch_size: Sequences at once.
        device: Where it runs.
        autocast: Dtype of matrix products; ``None`` for that of the weights.
    """

    def __init__(
        self,
        student: Model,
        module: nn.Module,
        text: RecoveryText,
        *,
        batch_size: int,
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> None:
        self._student = student
        self._module = module
        self._text = text
        self._ids_ML = text.held_out_ML
        self._first = len(text.train_NL)
        self._batch_size = batch_size
        self._device = device
        self._autocast = autocast

    def perplexity(self) -> float:
        """The perplexity of the text, infinite where it is not a finite number."""
        return self._perplexity(self._sums(None)[0])

    def score(self, teacher: Teacher) -> RecoveryScore:
        """The perplexity of the text, and the divergence from a teacher on it."""
        loss, kl = self._sums(teacher)
        return {"perplexity": self._perplexity(loss), "kl": kl / (len(self._ids_ML) * self._text.logit_length)}

    def _sums(self, teacher: Teacher | None) -> tuple[float, float]:
        """Negative log-likelihoods and divergences, summed over the text in float64."""
        own = ranks.block(len(self._ids_ML))
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad(), self._evaluating():
            for start in range(own.start, own.stop, self._batch_size):
                numbers = torch.arange(start, min(start + self._batch_size, own.stop))
                ids_BL = self._ids_ML[numbers].to(self._device)
                logits_BTV = self._student(ids_BL).float()
                sums[0] += text_loss(logits_BTV, self._text.labels(ids_BL)).double().cpu()
                if teacher is not None:
                    targets = teacher.targets((numbers + self._first).to(self._device), ids_BL)
                    sums[1] += divergence_from(targets, logits_BTV).double().cpu()
        loss, kl = ranks.add_up(sums).tolist()
        return loss, kl

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self._module.training
        self._module.eval()
        kind, dtype = self._device.type, self._autocast
        try:
            with torch.autocast(kind, dtype or torch.bfloat16, enabled=dtype is not None):
                yield
        finally:
            self._module.train(was_training)

    def _perplexity(self, loss: float) -> float:
        mean = loss / self._text.labels(self._ids_ML).numel()
        return math.exp(mean) if math.isfinite(mean) and mean < GREATEST_LOSS else math.inf
