"""Reduces the router from N experts to K; pure functions of tensors."""

from hcsmoe_hub.methods.routing.agreement import top_k_agreement
from hcsmoe_hub.methods.routing.fit import fit_rows, group_targets, mismatch
from hcsmoe_hub.methods.routing.reduce import reduce_rows, remap_experts
from hcsmoe_hub.methods.routing.scoring import Scoring, WeightRule, find_rule

__all__ = [
    "Scoring",
    "WeightRule",
    "find_rule",
    "fit_rows",
    "group_targets",
    "mismatch",
    "reduce_rows",
    "remap_experts",
    "top_k_agreement",
]
