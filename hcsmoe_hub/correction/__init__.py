"""Corrections of one reduced layer towards the original one, each kept only if it helps on text it has not seen."""

from collections.abc import Mapping

from torch import Tensor

from hcsmoe_hub.checkpoint.microbatch import MicroBatcher
from hcsmoe_hub.checkpoint.skeleton import Skeleton
from hcsmoe_hub.correction.blocks import reconstruct
from hcsmoe_hub.correction.experts import correct_experts
from hcsmoe_hub.model import Model
from hcsmoe_hub.moe.blocks import MoEBlock
from hcsmoe_hub.observation import Observation
from hcsmoe_hub.options import Correct
from hcsmoe_hub.report import CorrectionReport

__all__ = ["correct"]


def correct(
    what: Correct,
    model: Model,
    reduced: Skeleton,
    block: MoEBlock,
    changed: Mapping[str, Tensor],
    seen: Observation,
    batcher: MicroBatcher,
    *,
    seed: int,
) -> CorrectionReport | None:
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
        What the correction did on tokens that it was not fitted to; ``None`` if nothing is to be corrected.
    """
    match what:
        case Correct.NONE:
            return None
        case Correct.DOWN | Correct.EXPERTS:
            return correct_experts(what, model, reduced, block, changed, seen, batcher, seed=seed)
        case Correct.BLOCKS:
            first = correct_experts(Correct.EXPERTS, model, reduced, block, changed, seen, batcher, seed=seed)
            return reconstruct(first, model, reduced, block, changed, seen, batcher, seed=seed)
