"""Weighted averages of the members of a cluster, tensor by tensor.

E source experts, C clusters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hcsmoe_hub.clustering.clusters import Clusters
from hcsmoe_hub.options import Merge

BLOCK = 1 << 18


def member_weights(clusters: Clusters, usage_E: Sequence[float], merge: Merge) -> tuple[float, ...]:
    """Share of every expert in its merged expert; the shares of a cluster sum to 1.

    ``frequency``: ``f_i / sum_{j in C} f_j`` with f the number of calibration tokens routed to an expert (HC-SMoE,
    algorithm 1, line 7). ``average``: ``1 / |C|``. A cluster that no token reached has no frequencies, so its members
    count equally.

    Returns:
        One weight per source expert.
    """
    weights = [0.0] * len(clusters.labels)
    for cluster in clusters.members:
        total = sum(usage_E[expert] for expert in cluster)
        for expert in cluster:
            match merge:
                case Merge.FREQUENCY if total > 0:
                    weights[expert] = usage_E[expert] / total
                case Merge.FREQUENCY | Merge.AVERAGE:
                    weights[expert] = 1 / len(cluster)
    return tuple(weights)


def merge_rows(rows_E: Tensor, clusters: Clusters, weight_E: Sequence[float]) -> Tensor:
    """Weighted sum of the members of every cluster: ``E_C = sum_{i in C} w_i E_i``.

    Sums in float32 (float64 for float64 input) and rounds once. An expert that is alone in its cluster keeps its bits.

    Args:
        rows_E: ``[E, ...]``, one entry per source expert.
        clusters: A partition of the E experts.
        weight_E: Shares from ``member_weights``.

    Returns:
        ``[C, ...]`` in the dtype of ``rows_E``.
    """
    members = clusters.members
    merged_C = rows_E.new_empty((len(members), *rows_E.shape[1:]))
    for number, cluster in enumerate(members):
        if len(cluster) == 1:
            merged_C[number] = rows_E[cluster[0]]
            continue
        # Block by block, so that the wide intermediate stays in the processor's cache and adds nothing to the peak.
        blocks = [rows_E[expert].reshape(-1).split(BLOCK) for expert in cluster]
        targets = merged_C[number].view(-1).split(BLOCK)
        for target, *parts in zip(targets, *blocks, strict=True):
            target.copy_(_weighted_sum(parts, [weight_E[expert] for expert in cluster]))
    return merged_C


def _weighted_sum(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_i w_i x_i`` of equally shaped tensors, in float32 or wider."""
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    total = parts[0].to(wide) * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.add_(part, alpha=weight)
    return total
