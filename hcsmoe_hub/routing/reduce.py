"""N router rows to K: rows, biases, correction biases and scales alike, whatever is sized by experts.

E source experts, C clusters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hcsmoe_hub.clustering.clusters import Clusters
from hcsmoe_hub.merging.weighted import member_weights, merge_rows
from hcsmoe_hub.options import Merge, RouterPolicy


def reduce_rows(rows_E: Tensor, clusters: Clusters, usage_E: Sequence[float], policy: RouterPolicy) -> Tensor:
    """One router row per cluster.

    The papers keep all N rows; a checkpoint with K experts needs K. ``dominant`` takes the row of the cluster's most
    used expert, ``frequency`` and ``average`` take the weighted or plain mean of its members' rows.

    Args:
        rows_E: ``[E, ...]``: router weight, bias, correction bias or scale, one entry per source expert.
        clusters: A partition of the E experts.
        usage_E: How often the router chose each expert.
        policy: The rule.

    Returns:
        ``[C, ...]`` in the dtype of ``rows_E``.
    """
    match policy:
        case RouterPolicy.DOMINANT:
            return rows_E[list(clusters.dominant(usage_E))]
        case RouterPolicy.FREQUENCY:
            return merge_rows(rows_E, clusters, member_weights(clusters, usage_E, Merge.FREQUENCY))
        case RouterPolicy.AVERAGE:
            return merge_rows(rows_E, clusters, member_weights(clusters, usage_E, Merge.AVERAGE))


def remap_experts(table: Tensor, clusters: Clusters) -> Tensor:
    """Replaces expert numbers by the numbers of their clusters, in a table of expert numbers of any shape."""
    labels = torch.tensor(clusters.labels, device=table.device)
    return labels[table.long()].to(table.dtype)
