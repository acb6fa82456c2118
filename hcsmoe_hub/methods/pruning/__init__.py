"""Chooses the experts that are kept when the others are pruned; pure functions."""

from hcsmoe_hub.methods.pruning.gram import DroppedEnergy, ScaledResidual
from hcsmoe_hub.methods.pruning.scores import keep_best, keep_only
from hcsmoe_hub.methods.pruning.search import least_loss
from hcsmoe_hub.methods.pruning.subsets import best_subset

__all__ = ["DroppedEnergy", "ScaledResidual", "best_subset", "keep_best", "keep_only", "least_loss"]
