"""Merges the members of a cluster into one expert; pure functions of tensors."""

from hcsmoe_hub.methods.merging.copies import find_copies
from hcsmoe_hub.methods.merging.merge import FIRST_EXPERT, Merged, MergeGroups, merge_experts
from hcsmoe_hub.methods.merging.neuron_origins import NeuronOrigins
from hcsmoe_hub.methods.merging.neurons import Neurons
from hcsmoe_hub.methods.merging.shares import member_shares
from hcsmoe_hub.methods.merging.weighted import merge_rows

__all__ = [
    "FIRST_EXPERT",
    "MergeGroups",
    "Merged",
    "NeuronOrigins",
    "Neurons",
    "find_copies",
    "member_shares",
    "merge_experts",
    "merge_rows",
]
