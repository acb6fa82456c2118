"""What the members of a cluster become: one expert; pure functions of tensors."""

from hcsmoe_hub.merging.merge import Merged, merge_experts
from hcsmoe_hub.merging.neurons import Neurons
from hcsmoe_hub.merging.shares import member_shares
from hcsmoe_hub.merging.weighted import merge_rows

__all__ = ["Merged", "Neurons", "member_shares", "merge_experts", "merge_rows"]
