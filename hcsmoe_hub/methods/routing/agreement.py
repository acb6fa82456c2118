"""How often the reduced router chooses what the full one chose.

T tokens, K experts per token.
"""

import torch
from torch import Tensor

from hcsmoe_hub.methods.clustering.clusters import DROPPED, Clusters


def top_k_agreement(full_TK: Tensor, reduced_TK: Tensor, clusters: Clusters) -> float:
    """Share of the full router's choices, as clusters, that the reduced router makes as well.

    For every token: ``|G & R| / |G|`` with G the set of clusters of the experts that the full router chose, R the set
    of merged experts that the reduced router chooses; averaged over the tokens for which the full router chose any.
    A pruned expert counts as a cluster that the reduced router cannot choose.

    Args:
        full_TK: Source experts chosen by the full router; -1 for none.
        reduced_TK: Merged experts chosen by the reduced router; -1 for none.
        clusters: The partition that connects the two.

    Returns:
        Between 0 and 1; 1 when no token was routed at all.
    """
    labels, classes = list(clusters.labels), len(clusters.members)
    for expert, label in enumerate(labels):
        if label == DROPPED:
            # A class of its own, beyond those that the reduced router can choose.
            labels[expert], classes = classes, classes + 1
    # The last entry stands for "no expert" and is cut off again.
    label_of = torch.tensor([*labels, classes], device=full_TK.device)
    full_TC = _sets(label_of[full_TK.long()], classes)
    reduced_TC = _sets(torch.where(reduced_TK < 0, classes, reduced_TK).long(), classes)
    wanted_T = full_TC.sum(1)
    met_T = (full_TC & reduced_TC).sum(1)
    routed = wanted_T > 0
    return float((met_T[routed] / wanted_T[routed]).mean()) if routed.any() else 1.0


def _sets(class_TK: Tensor, classes: int) -> Tensor:
    """Which classes every token is led to, ``[T, classes]``; the number of classes stands for none."""
    found_TC = torch.zeros(len(class_TK), classes + 1, dtype=torch.bool, device=class_TK.device)
    return found_TC.scatter_(1, class_TK, True)[:, :-1]
