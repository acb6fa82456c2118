"""Refits of one reduced layer towards the original one, each kept only if it helps on text it has not seen."""

from collections.abc import Mapping

from torch import Tensor

from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.layer.refit_block import refit_block
from hcsmoe_hub.layer.refit_down import refit_down
from hcsmoe_hub.observation.watcher import Observation
from hcsmoe_hub.options import Refit
from hcsmoe_hub.report import RefitReport


def refit_layer(
    layer: LayerContext, changed: Mapping[str, Tensor], *, what: Refit, passes: int, seen: Observation, seed: int
) -> RefitReport | None:
    """Fits a reduced block to the routed output of the original one, in place where that helps.

    Args:
        layer: The layer.
        changed: Tensors of its block in the result, by parameter name; written to.
        what: What is fitted.
        passes: How often a descent sees the tokens.
        seen: Inputs of the block, and the routed outputs it is fitted to.
        seed: Of the choice of tokens.

    Returns:
        What the refit did on tokens that it was not fitted to; ``None`` if nothing is to be refitted.
    """
    match what:
        case Refit.NONE:
            return None
        case Refit.DOWN:
            return refit_down(layer, changed, seen=seen)
        case Refit.BLOCK | Refit.MODEL:
            return refit_block(layer, changed, passes=passes, seen=seen, seed=seed)
