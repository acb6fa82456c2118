"""Matrices as a low-rank part plus a few whole rows, ``W ~ U V + S`` (MC-SMoE, arXiv 2310.01334)."""

from hcsmoe_hub.methods.compress.decompose import Decomposition, decompose
from hcsmoe_hub.methods.compress.spectrum import singular_values, stable_rank
from hcsmoe_hub.methods.compress.whitening import Whitening

__all__ = ["Decomposition", "Whitening", "decompose", "singular_values", "stable_rank"]
