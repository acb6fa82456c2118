"""How often the reduced router chooses what the full one chose.

T tokens, K experts per token.
"""

import torch
import torch.nn.functional as F
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
    label_of = torch.tensor([*labels, classes])
    full_TC = F.one_hot(label_of[full_TK.long()], classes + 1).amax(1)[:, :-1]
    reduced = torch.where(reduced_TK < 0, classes, reduced_TK).long()
    reduced_TC = F.one_hot(reduced, classes + 1).amax(1)[:, :-1]
    wanted_T = full_TC.sum(1)
    met_T = (full_TC * reduced_TC).sum(1)
    routed = wanted_T > 0
    return float((met_T[routed] / wanted_T[routed]).mean()) if routed.any() else 1.0
