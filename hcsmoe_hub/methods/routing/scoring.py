"""How a router turns logits into the weights of its choices, inferred from its outputs.

T tokens, E experts, K experts per token, X rows of the router that belong to no expert.
"""

from dataclasses import dataclass
from enum import Enum, auto
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor


class Scoring(Enum):
    """What a logit becomes before or after the choice."""

    SOFTMAX = auto()
    SIGMOID = auto()
    ROOT_SOFTPLUS = auto()


@dataclass(frozen=True, slots=True)
class WeightRule:
    """How router weights follow from logits, up to a constant factor.

    Attributes:
        scoring: What a logit becomes.
        is_share: Whether the scores of the chosen experts are divided by their sum.
    """

    scoring: Scoring
    is_share: bool


# In order of preference where several agree with what a router did: one choice per token, as a share, is always 1.
RULES = tuple(WeightRule(scoring, is_share) for scoring, is_share in product(Scoring, (True, False)))


def scores(logits_TE: Tensor, extra_TX: Tensor, scoring: Scoring) -> Tensor:
    """Scores of all experts, ``[T, E]`` float64.

    Args:
        logits_TE: Raw logits, whatever their dtype.
        extra_TX: Logits of rows that belong to no expert; a softmax counts them in.
        scoring: What a logit becomes.
    """
    wide_TE = logits_TE.double()
    match scoring:
        case Scoring.SOFTMAX:
            return torch.cat([wide_TE, extra_TX.double()], dim=1).softmax(dim=1)[:, : wide_TE.shape[1]]
        case Scoring.SIGMOID:
            return wide_TE.sigmoid()
        case Scoring.ROOT_SOFTPLUS:
            return F.softplus(wide_TE).sqrt()


def find_rule(logits_TE: Tensor, extra_TX: Tensor, index_TK: Tensor, weight_TK: Tensor) -> WeightRule:
    """The rule whose weights come nearest to those of a router, in the sum of squares, up to a factor.

    Architectures compute the same few rules in many ways and name them by different options; the weights of their
    routers show which one is in force.

    Args:
        logits_TE: Raw logits.
        extra_TX: Logits of rows that belong to no expert.
        index_TK: Chosen experts; -1 for none.
        weight_TK: Router weights of the choices.
    """
    is_chosen_TK = index_TK >= 0
    given_TK = torch.where(is_chosen_TK, weight_TK, 0).double()

    def distance(rule: WeightRule) -> float:
        score_TK = scores(logits_TE, extra_TX, rule.scoring).gather(1, index_TK.long().clamp(min=0)) * is_chosen_TK
        if rule.is_share:
            score_TK = score_TK / score_TK.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        size = float(score_TK.square().sum())
        factor = float((given_TK * score_TK).sum()) / size if size else 0.0
        return float((given_TK - factor * score_TK).square().sum())

    return min(RULES, key=distance)
