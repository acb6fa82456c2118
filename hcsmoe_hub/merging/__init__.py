"""What the members of a cluster become: one expert; pure functions of tensors."""

from hcsmoe_hub.merging.weighted import member_weights, merge_rows

__all__ = ["member_weights", "merge_rows"]
