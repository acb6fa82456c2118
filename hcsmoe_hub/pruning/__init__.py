"""Which experts stay when the others are simply left out; pure functions."""

from hcsmoe_hub.pruning.reconstruction import best_subset
from hcsmoe_hub.pruning.scores import keep_best, keep_only

__all__ = ["best_subset", "keep_best", "keep_only"]
