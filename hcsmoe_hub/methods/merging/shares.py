"""How much each member of a cluster counts.

E source experts, C clusters.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hcsmoe_hub.methods.clustering.clusters import Clusters, Grouping
from hcsmoe_hub.options import Merge


def proportional_shares(clusters: Clusters, score_E: Sequence[float]) -> Tensor:
    """Shares in proportion to a score: ``s_i / sum_{j in C} s_j``; equal ones where all scores of a cluster are zero.

    With the number of calibration tokens routed to an expert as the score: HC-SMoE, algorithm 1, line 7, and M-SMoE,
    eq. 2.

    Args:
        clusters: A partition of the E experts; dropped ones have no share in anything.
        score_E: A score of every source expert, not negative.

    Returns:
        ``[E, C]`` float64; every column sums to 1.
    """
    share_EC = torch.zeros(len(clusters.labels), len(clusters.members), dtype=torch.float64)
    for number, cluster in enumerate(clusters.members):
        total = sum(score_E[expert] for expert in cluster)
        for expert in cluster:
            share_EC[expert, number] = score_E[expert] / total if total > 0 else 1 / len(cluster)
    return share_EC


def equal_shares(clusters: Clusters) -> Tensor:
    """``1 / |C|`` for every member, ``[E, C]`` float64."""
    return proportional_shares(clusters, [1.0] * len(clusters.labels))


def dominant_shares(clusters: Clusters, dominants: Sequence[int], weights: tuple[float, float]) -> Tensor:
    """One weight for the dominant expert of every cluster and one for every other, normalised within the cluster.

    Args:
        clusters: A partition of the E experts.
        dominants: The dominant expert of every cluster.
        weights: Weight of a dominant expert and of every other one.

    Returns:
        ``[E, C]`` float64; every column sums to 1.
    """
    leaders = set(dominants)
    return proportional_shares(clusters, [weights[expert not in leaders] for expert in range(len(clusters.labels))])


def membership_shares(membership_EC: NDArray[np.float64]) -> Tensor:
    """Shares of a fuzzy clustering: ``u_ij / sum_i u_ij``, where every expert is a member of every cluster.

    HC-SMoE, appendix B.5, prints the merged expert as ``sum_i u_ij E_i``. Memberships of one expert sum to 1 over the
    clusters, not over the experts, so that sum would make an expert about E / C times too large; the normaliser keeps
    it an average.

    Args:
        membership_EC: Memberships, rows summing to 1.

    Returns:
        ``[E, C]`` float64; every column sums to 1.
    """
    share_EC = torch.tensor(membership_EC, dtype=torch.float64)
    return share_EC / share_EC.sum(0)


def member_shares(
    grouping: Grouping,
    merge: Merge,
    *,
    usage_E: Sequence[float] | None = None,
    saliency_E: Sequence[float] | None = None,
    dominants: Sequence[int] | None = None,
    dominant_weights: tuple[float, float] | None = None,
) -> Tensor:
    """Share of every source expert in every merged expert.

    ``frequency``, and ``neurons`` for what belongs to no neuron: in proportion to usage. ``saliency``: in proportion to
    the summed router-weighted norm of an expert's outputs. ``dominant``: a fixed weight for the dominant expert and one
    for the others. ``membership``: in proportion to fuzzy memberships. ``average`` and the merges that average neurons:
    equally.

    Args:
        grouping: A partition of the E experts, with memberships if it is fuzzy; dropped experts have no share.
        merge: The rule; it determines which of the following are needed.
        usage_E: How often the router chose each expert.
        saliency_E: Sum over the tokens routed to an expert of router weight times norm of its output.
        dominants: The dominant expert of every cluster.
        dominant_weights: Weight of a dominant expert and of every other one.

    Returns:
        ``[E, C]`` float64; every column sums to 1. A partition leaves at most one entry of a row above zero.
    """
    clusters = grouping.clusters
    match merge:
        case Merge.FREQUENCY | Merge.NEURONS:
            assert usage_E is not None
            return proportional_shares(clusters, usage_E)
        case Merge.SALIENCY:
            assert saliency_E is not None
            return proportional_shares(clusters, saliency_E)
        case Merge.DOMINANT:
            assert dominants is not None
            assert dominant_weights is not None
            return dominant_shares(clusters, dominants, dominant_weights)
        case Merge.MEMBERSHIP:
            assert grouping.membership_EC is not None
            return membership_shares(grouping.membership_EC)
        case Merge.AVERAGE | Merge.FIX_DOM | Merge.FIX_DOM_ONE_TO_ONE | Merge.ZIPIT:
            return equal_shares(clusters)
