"""A next-token distribution as its most likely tokens and the mass of all others, and the divergence from it.

... stands for any shape, V entries of the vocabulary, P of them kept.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Logarithm of a mass of zero that may be multiplied by that mass.
_NEVER = -1e4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopK:
    """What is kept of a distribution.

    Attributes:
        values: Natural logarithms of the probabilities of the most likely tokens, ``[..., P]``, in descending order.
        tokens: Their ids, ``[..., P]`` int64.
        rest: Logarithm of the mass of all other tokens, ``[...]``; minus infinity where none are left.
        warm_rest: ``log(sum of p_v ** (1 / T))`` over all other tokens v, with their probabilities p and a temperature
            T, ``[...]``: with ``values / T``, it makes the distribution at that temperature.
    """

    values: Tensor
    tokens: Tensor
    rest: Tensor
    warm_rest: Tensor


def keep_top_k(logits: Tensor, count: int, temperature: float) -> TopK:
    """Keeps the most likely tokens of next-token distributions.

    Args:
        logits: ``[..., V]``, floating-point.
        count: P, at most V.
        temperature: That of ``warm_rest``, above 0.

    Returns:
        Values in float32, on the device of the logits.
    """
    logs = logits.float().log_softmax(-1)
    values, tokens = logs.topk(count, dim=-1)
    others = _without(logs, tokens)
    return TopK(values=values, tokens=tokens, rest=others.logsumexp(-1), warm_rest=(others / temperature).logsumexp(-1))


def top_k_divergence(logits: Tensor, values: Tensor, tokens: Tensor, rest: Tensor) -> Tensor:
    r"""KL divergence of a student from what is kept of its teacher, with all other tokens as one class.

    With the distributions :math:`p` of the teacher and :math:`q` of the student, and the kept tokens
    :math:`\mathcal{K}`:

    .. math::

        \sum_{v \in \mathcal{K}} p_v \log \frac{p_v}{q_v}
        + p_{\text{rest}} \log \frac{p_{\text{rest}}}{q_{\text{rest}}},
        \qquad p_{\text{rest}} = 1 - \sum_{v \in \mathcal{K}} p_v,
        \quad q_{\text{rest}} = 1 - \sum_{v \in \mathcal{K}} q_v

    It never exceeds the divergence over the whole vocabulary, and equals it if all tokens are kept.

    Args:
        logits: Logits of the student, ``[..., V]``. At a temperature T other than 1, all of them divided by T.
        values: Logarithms of the teacher's probabilities, or its logits, of the kept tokens, ``[..., P]``; divided by T
            as well.
        tokens: Their ids, ``[..., P]`` int64.
        rest: Logarithm of the sum of ``exp(value)`` over all other tokens, ``[...]``, their values divided by T as
            well.

    Returns:
        ``[...]`` float32, in nats; not multiplied by the square of T.
    """
    logits, wanted = logits.float(), values.float()
    own = logits.gather(-1, tokens)
    if tokens.shape[-1] < logits.shape[-1]:
        own = torch.cat([own, _without(logits, tokens).logsumexp(-1, keepdim=True)], -1)
        wanted = torch.cat([wanted, rest.float()[..., None]], -1)
    wanted = wanted.log_softmax(-1).clamp(min=_NEVER)
    return F.kl_div(own.log_softmax(-1), wanted, reduction="none", log_target=True).sum(-1)


def _without(values: Tensor, tokens: Tensor) -> Tensor:
    """The values of all but some tokens; minus infinity in place of these."""
    return values.scatter(-1, tokens, float("-inf"))
