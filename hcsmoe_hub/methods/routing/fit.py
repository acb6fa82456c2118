"""Router rows that give every group the score of its members in the full router; a convex fit, layer by layer.

T tokens, K experts per token, H input size of the router, E source experts, C groups, X rows that belong to no expert.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from hcsmoe_hub.methods.clustering.clusters import DROPPED, Clusters
from hcsmoe_hub.methods.routing.scoring import Scoring, WeightRule, scores

# Strength of the pull towards the rows so far, for inputs whose mean square is one.
RIDGE = 1e-2
ITERATIONS = 100
# Nodes of the quadrature by which a score without an elementary integral is integrated.
NODES = 32


def group_targets(
    logits_TE: Tensor, extra_TX: Tensor, index_TK: Tensor, rule: WeightRule, clusters: Clusters
) -> tuple[Tensor, Tensor]:
    """The score that each group should get from K rows.

    A chosen group gets the sum of its chosen members' scores. Where the full router divides the scores of the chosen
    experts by their sum, these are shares, and no other group gets any. Where it leaves a softmax as it is, the sum of
    the chosen weights must stay what it was, so the rest of one goes to the groups that were not chosen, in proportion
    to the scores of their members. Independent scores are at most what a sigmoid reaches.

    Args:
        logits_TE: Raw logits of the full router.
        extra_TX: Logits of its rows that belong to no expert.
        index_TK: Source experts that it chose; -1 for none.
        rule: How it weighs them.
        clusters: The groups; a dropped expert belongs to none.

    Returns:
        Targets ``[T, C]`` float32, and ``[T]`` whether a token has any: one whose choices were all dropped has none.
    """
    score_TE = scores(logits_TE, extra_TX, rule.scoring)
    chosen_TE = F.one_hot(torch.where(index_TK < 0, score_TE.shape[1], index_TK).long(), score_TE.shape[1] + 1)
    chosen_TE = chosen_TE.amax(1)[:, :-1] * score_TE
    count = len(clusters.members)
    labels_E = torch.tensor([count if label == DROPPED else label for label in clusters.labels])
    member_EC = F.one_hot(labels_E, count + 1)[:, :count].to(score_TE)
    target_TC = chosen_TE @ member_EC
    total_T1 = target_TC.sum(1, keepdim=True)
    has_target_T = total_T1[:, 0] > 0
    tiny = torch.finfo(torch.float64).tiny
    match rule.scoring:
        case Scoring.SOFTMAX if rule.is_share:
            target_TC = target_TC / total_T1.clamp(min=tiny)
        case Scoring.SOFTMAX:
            others_TC = torch.where(target_TC > 0, 0, score_TE @ member_EC)
            others_T1 = others_TC.sum(1, keepdim=True)
            # What the rows of no expert do not take; dropped experts leave their part to the others.
            free_T1 = 1 - scores(extra_TX, logits_TE, rule.scoring).sum(1, keepdim=True)
            shared_TC = target_TC + (free_T1 - total_T1) * others_TC / others_T1.clamp(min=tiny)
            target_TC = torch.where(others_T1 > 0, shared_TC, target_TC * free_T1 / total_T1.clamp(min=tiny))
        case Scoring.SIGMOID:
            target_TC = target_TC.clamp(max=1)
        case Scoring.ROOT_SOFTPLUS:
            pass
    return target_TC.float(), has_target_T


def mismatch(logits_TC: Tensor, targets_TC: Tensor, scoring: Scoring, extra_TX: Tensor) -> Tensor:
    """The matching loss of a scoring function, a mean over tokens; convex in the logits.

    ``L(z, y) = Phi(z) - y . z`` where the gradient of Phi is the score, so that the loss is least where every score
    equals its target in the mean (Auer, Herbster and Warmuth 1996). For a softmax it is the cross-entropy and for a
    sigmoid the binary cross-entropy, both up to terms without z.

    Args:
        logits_TC: Logits of the groups, float32.
        targets_TC: From ``group_targets``.
        scoring: What a logit becomes.
        extra_TX: Logits of rows that belong to no expert and stay as they are.
    """
    match scoring:
        case Scoring.SOFTMAX:
            potential_T = torch.cat([logits_TC, extra_TX], dim=1).logsumexp(dim=1)
        case Scoring.SIGMOID:
            potential_T = F.softplus(logits_TC).sum(1)
        case Scoring.ROOT_SOFTPLUS:
            # A mean over the way from zero, times its length.
            parts = (weight * F.softplus(logits_TC * node).sqrt() for node, weight in _quadrature())
            potential_T = (logits_TC * torch.stack(list(parts)).sum(0)).sum(1)
    return (potential_T - (targets_TC * logits_TC).sum(1)).mean(dtype=torch.float64)


@lru_cache
def _quadrature() -> list[tuple[float, float]]:
    """Nodes and weights of Gauss and Legendre between 0 and 1."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    return list(zip(((nodes + 1) / 2).tolist(), (weights / 2).tolist(), strict=True))


def fit_rows(
    inputs_TH: Tensor,
    targets_TC: Tensor,
    rows_CH: Tensor,
    bias_C: Tensor | None,
    *,
    scoring: Scoring,
    extra_TX: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Rows, and a bias where there is one, whose scores come nearest to given targets.

    ``min (1/T) sum_t L(W x_t + b, y_t) + (RIDGE / 2) sum_h m_h ||W_h - W0_h||^2`` with L from ``mismatch`` and m_h the
    mean square of feature h, so that features of any size are pulled back alike (the bias counts as a feature of one).
    Strictly convex, with one solution; solved by L-BFGS from the rows so far.

    Args:
        inputs_TH: What the router's matrix is given, float32.
        targets_TC: From ``group_targets``, float32.
        rows_CH: ``W0``, any float dtype.
        bias_C: ``b0``, or ``None`` if the router adds none.
        scoring: What a logit becomes.
        extra_TX: Logits of rows that belong to no expert, float32.

    Returns:
        ``W`` and ``b``, float32.
    """
    if bias_C is not None:
        inputs_TH = torch.cat([inputs_TH, torch.ones_like(inputs_TH[:, :1])], dim=1)
        rows_CH = torch.cat([rows_CH.float(), bias_C.float()[:, None]], dim=1)
    start_CH = rows_CH.to(inputs_TH)
    size_H = inputs_TH.square().mean(0).sqrt()
    size_H = torch.where(size_H > 0, size_H, 1)
    scaled_TH, start_TC = inputs_TH / size_H, inputs_TH @ start_CH.T

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        step_CH = torch.from_numpy(flat).view(start_CH.shape).to(scaled_TH)
        logits_TC = (start_TC + scaled_TH @ step_CH.T).requires_grad_()
        with torch.enable_grad():
            loss = mismatch(logits_TC, targets_TC, scoring, extra_TX)
            (slope_TC,) = torch.autograd.grad(loss, logits_TC)
        # Together: each copy from the device waits for it.
        found = torch.cat([loss.detach().view(1), (slope_TC.T @ scaled_TH).double().flatten()]).cpu().numpy()
        return float(found[0]) + RIDGE / 2 * float(flat @ flat), found[1:] + RIDGE * flat

    found = minimize(
        objective, np.zeros(start_CH.numel()), jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS}
    )
    step_CH = torch.from_numpy(found.x).view(start_CH.shape).to(scaled_TH)
    fitted_CH = start_CH + step_CH / size_H
    return (fitted_CH, None) if bias_C is None else (fitted_CH[:, :-1], fitted_CH[:, -1])
