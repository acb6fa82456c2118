"""What a teacher says about the sequences of a recovery, from memory or from a file.

B sequences of a batch, L tokens each, T of them with logits, V vocabulary, P places of the most likely tokens. T is L
of a decoder alone, and the number of labels behind an encoder.
"""

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from hcsmoe_hub.methods.distil.losses import divergence
from hcsmoe_hub.methods.distil.top_k import top_k_divergence
from hcsmoe_hub.methods.distil.training import Model
from hcsmoe_hub.methods.totals import total


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AllLogits:
    """The teacher's logits of a batch.

    Attributes:
        logits_BTV: ``[B, T, V]``, of any floating-point dtype.
    """

    logits_BTV: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopLogits:
    """The teacher's largest logits of a batch, and what the others add up to.

    Attributes:
        values_BTP: The largest logits, ``[B, T, P]``, of any floating-point dtype.
        tokens_BTP: The tokens that they belong to, ``[B, T, P]`` int64.
        rest_BT: Logarithm of the sum of ``exp(logit)`` of all other tokens, ``[B, T]`` float32; minus infinity if
            there are none.
        warm_rest_BT: The same of ``exp(logit / temperature)``, at the temperature of the recovery.
    """

    values_BTP: Tensor
    tokens_BTP: Tensor
    rest_BT: Tensor
    warm_rest_BT: Tensor


Targets: TypeAlias = AllLogits | TopLogits


class Teacher(Protocol):
    """Gives the targets of sequences, by the numbers that ``RecoveryText.sequence`` counts them by."""

    def targets(self, numbers_B: Tensor, ids_BL: Tensor) -> Targets:
        """The targets of a batch, on the device of its token ids, without gradients.

        Args:
            numbers_B: Numbers of the sequences, ``[B]`` int64: first those that are trained on, then the held-out ones.
            ids_BL: Their token ids, ``[B, L]`` int64.
        """
        ...


class LoadedTeacher:
    """A teacher in memory.

    Args:
        model: Its forward pass.
    """

    def __init__(self, model: Model) -> None:
        self._model = model

    @torch.no_grad()
    def targets(self, numbers_B: Tensor, ids_BL: Tensor) -> Targets:
        """All logits of a batch; see ``Teacher``."""
        return AllLogits(logits_BTV=self._model(ids_BL))


def divergence_from(targets: Targets, student_BTV: Tensor, temperature: float | None = None) -> Tensor:
    """Sum over tokens of the KL divergence of a student from its teacher, in nats.

    Args:
        targets: Of the teacher.
        student_BTV: Logits of the student, ``[B, T, V]``.
        temperature: That of the recovery, which the logits of both are divided by; ``None`` for none.
    """
    divisor = temperature or 1.0
    if isinstance(targets, AllLogits):
        return divergence(student_BTV, targets.logits_BTV, divisor)
    rest_BT = targets.rest_BT if temperature is None else targets.warm_rest_BT
    logits_BTV, values_BTP = student_BTV.float() / divisor, targets.values_BTP.float() / divisor
    return total(top_k_divergence(logits_BTV, values_BTP, targets.tokens_BTP, rest_BT))
