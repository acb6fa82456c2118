"""How the router follows when N experts become K; pure functions of tensors."""

from hcsmoe_hub.routing.agreement import top_k_agreement
from hcsmoe_hub.routing.reduce import reduce_rows, remap_experts

__all__ = ["reduce_rows", "remap_experts", "top_k_agreement"]
