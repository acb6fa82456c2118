"""Refits of one reduced layer towards the original one, each kept only if it helps on text it has not seen."""

from collections.abc import Mapping

from torch import Tensor

from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.layer.refit_block import refit_block
from hcsmoe_hub.layer.refit_experts import refit_experts
from hcsmoe_hub.observation.watcher import Observation
from hcsmoe_hub.options import Refit
from hcsmoe_hub.report import RefitReport


def refit_layer(
    layer: LayerContext, changed: Mapping[str, Tensor], *, what: Refit, seen: Observation, seed: int
) -> RefitReport | None:
    """Fits a reduced block to the routed output of the original one, in place where that helps.

    Args:
        layer: The layer.
        changed: Tensors of its block in the result, by parameter name; written to.
        what: What is fitted.
        seen: Inputs of the block, and the routed outputs it is fitted to.
        seed: Of the choice of tokens.

    Returns:
        What the refit did on tokens that it was not fitted to; ``None`` if nothing is to be refitted.
    """
    match what:
        case Refit.NONE:
            return None
        case Refit.DOWN | Refit.EXPERTS:
            return refit_experts(layer, changed, what=what, seen=seen, seed=seed)
        case Refit.BLOCKS:
            first = refit_experts(layer, changed, what=Refit.EXPERTS, seen=seen, seed=seed)
            return refit_block(layer, changed, first=first, seen=seen, seed=seed)
