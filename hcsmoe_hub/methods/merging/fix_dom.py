"""Fix-Dom: neurons of the other members join those of the dominant expert.

E members of a cluster, I neurons of each, N = E I neurons.
"""

import torch
from torch import Tensor

from hcsmoe_hub.methods.merging.neuron_features import Describe, products


def fix_dom_groups(describe: Describe, experts: int, dominant: int) -> Tensor:
    """The neuron of the dominant expert that every neuron of the cluster joins: the one of highest correlation.

    HC-SMoE, appendix B.2. Any number of neurons may join one. Averaging a group of g neurons from E experts keeps the
    scale of what it computes, but in a plain average of the experts it would add g / E times as much to the output:
    groups that many neurons joined count too little, groups that none joined too much. ``fix-dom-one-to-one`` matches
    neurons one to one instead, as ``match_neurons`` does; every group then has E members, and the merge is the plain
    average of aligned experts, which keeps the scale of the down projection.

    Args:
        describe: Features of each member.
        experts: Number of members, E.
        dominant: Position of the dominant expert.

    Returns:
        ``[N]`` int64, member by member; each of 0 to I - 1 occurs. The lowest number among equally correlated ones.
    """
    dominant_RI = describe(dominant)
    groups = []
    for position in range(experts):
        if position == dominant:
            groups.append(torch.arange(dominant_RI.shape[1], device=dominant_RI.device))
        else:
            groups.append(products(dominant_RI, describe(position)).argmax(0).to(dominant_RI.device))
    return torch.cat(groups)
