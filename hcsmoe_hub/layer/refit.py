"""Refits of one reduced layer towards the original one, each kept only if it helps on text it has not seen."""

from collections.abc import Mapping

from torch import Tensor

from hcsmoe_hub.layer.refit_block import reconstruct
from hcsmoe_hub.layer.refit_experts import refit_experts
from hcsmoe_hub.model.blocks import MoEBlock
from hcsmoe_hub.model.microbatch import MicroBatcher
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.observation.watcher import Observation
from hcsmoe_hub.options import Refit
from hcsmoe_hub.report import RefitReport


def refit_layer(
    what: Refit,
    model: SourceModel,
    reduced: Skeleton,
    block: MoEBlock,
    changed: Mapping[str, Tensor],
    seen: Observation,
    batcher: MicroBatcher,
    *,
    seed: int,
) -> RefitReport | None:
    """Fits a reduced block to the routed output of the original one, in place where that helps.

    Args:
        what: What is fitted.
        model: The source, the layer's weights in memory.
        reduced: Skeleton of the result.
        block: The block.
        changed: Its tensors in the result, by parameter name; written to.
        seen: Inputs and outputs of the block in the source.
        batcher: Knows the device.
        seed: Of the choice of tokens.

    Returns:
        What the refit did on tokens that it was not fitted to; ``None`` if nothing is to be refitted.
    """
    match what:
        case Refit.NONE:
            return None
        case Refit.DOWN | Refit.EXPERTS:
            return refit_experts(what, model, reduced, block, changed, seen, batcher, seed=seed)
        case Refit.BLOCKS:
            first = refit_experts(Refit.EXPERTS, model, reduced, block, changed, seen, batcher, seed=seed)
            return reconstruct(first, model, reduced, block, changed, seen, batcher, seed=seed)
