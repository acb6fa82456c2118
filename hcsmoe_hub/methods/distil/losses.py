"""How far a student is from its teacher, and from a text. B sequences, L tokens, V vocabulary."""

import torch.nn.functional as F
from torch import Tensor

from hcsmoe_hub.methods.totals import total


def divergence(student_BLV: Tensor, teacher_BLV: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over tokens of the KL divergence of two next-token distributions from the teacher's side, in nats.

    Args:
        student_BLV: Logits ``[B, L, V]``.
        teacher_BLV: Logits ``[B, L, V]``.
        temperature: What both are divided by.
    """
    student, teacher = ((logits.float() / temperature).log_softmax(-1) for logits in (student_BLV, teacher_BLV))
    return total(F.kl_div(student, teacher, log_target=True, reduction="none"))


def text_loss(student_BLV: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum over labels of their negative log-likelihood, in nats.

    Args:
        student_BLV: Logits ``[B, L, V]``.
        labels_BT: Token ids ``[B, T]`` int64, those that the first T logits of each sequence are about.
    """
    logits_BTV = student_BLV[:, : labels_BT.shape[1]].float()
    losses = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), reduction="none")
    return total(losses)
