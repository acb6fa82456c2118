"""N router rows to K: rows, biases, correction biases and scales alike, whatever is sized by experts.

E source experts, C clusters.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hcsmoe_hub.methods.clustering.clusters import Clusters
from hcsmoe_hub.methods.merging.shares import equal_shares, membership_shares, proportional_shares
from hcsmoe_hub.methods.merging.weighted import merge_rows
from hcsmoe_hub.options import RouterPolicy


def reduce_rows(
    rows_E: Tensor,
    clusters: Clusters,
    policy: RouterPolicy,
    *,
    dominants: Sequence[int],
    usage_E: Sequence[float],
    membership_EC: NDArray[np.float64] | None = None,
) -> Tensor:
    """One router row per cluster.

    The papers keep all N rows; a checkpoint with K experts needs K. ``dominant`` takes the row of the cluster's
    dominant expert, ``frequency`` and ``average`` take the weighted or plain mean of its members' rows, and
    ``membership`` weighs the rows of all experts as it weighs the experts (HC-SMoE, appendix B.5). ``fit`` begins with
    the rows of ``membership`` where there are memberships, and of ``dominant`` elsewhere.

    Args:
        rows_E: ``[E, ...]``: router weight, bias, correction bias or scale, one entry per source expert.
        clusters: A partition of the E experts; rows of dropped experts go.
        policy: The rule.
        dominants: The dominant expert of every cluster.
        usage_E: How often the router chose each expert.
        membership_EC: Memberships of a fuzzy clustering, for the rule of that name and for ``fit``.

    Returns:
        ``[C, ...]`` in the dtype of ``rows_E``.
    """
    match policy:
        case RouterPolicy.FIT if membership_EC is not None:
            return merge_rows(rows_E, membership_shares(membership_EC))
        case RouterPolicy.DOMINANT | RouterPolicy.FIT:
            return rows_E[list(dominants)]
        case RouterPolicy.FREQUENCY:
            return merge_rows(rows_E, proportional_shares(clusters, usage_E))
        case RouterPolicy.AVERAGE:
            return merge_rows(rows_E, equal_shares(clusters))
        case RouterPolicy.MEMBERSHIP:
            assert membership_EC is not None
            return merge_rows(rows_E, membership_shares(membership_EC))


def remap_experts(table: Tensor, clusters: Clusters) -> Tensor:
    """Replaces expert numbers by the numbers of their clusters, in a table of expert numbers of any shape.

    A table that sends tokens to a dropped expert has no equivalent with fewer experts.
    """
    labels = torch.tensor(clusters.labels, device=table.device)
    remapped = labels[table.long()]
    assert (remapped >= 0).all(), "a table of experts names one that was dropped"
    return remapped.to(table.dtype)
