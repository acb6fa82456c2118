"""The least-squares correction of one layer, with a guard: it is kept only if it helps on text it was not fitted to."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hcsmoe_hub.checkpoint.layers import free
from hcsmoe_hub.checkpoint.microbatch import MicroBatcher
from hcsmoe_hub.checkpoint.skeleton import Skeleton
from hcsmoe_hub.measure import load_reduced, relative_error
from hcsmoe_hub.merging.least_squares import fit_down, routed_output
from hcsmoe_hub.model import Model
from hcsmoe_hub.moe.blocks import MoEBlock
from hcsmoe_hub.moe.experts import experts_of
from hcsmoe_hub.moe.neurons import neurons_of
from hcsmoe_hub.moe.observer import SampleObserver
from hcsmoe_hub.moe.sample import NeuronSample
from hcsmoe_hub.observation import Observation, rerun
from hcsmoe_hub.report import CorrectionReport

# One token in eight, at the end of the calibration set, is never fitted to.
HELD_OUT_SHARE = 8


def correct_down(
    model: Model,
    reduced: Skeleton,
    block: MoEBlock,
    changed: Mapping[str, Tensor],
    seen: Observation,
    batcher: MicroBatcher,
) -> CorrectionReport:
    """Fits the down projections of a reduced block to the routed output of the original one, in place if that helps.

    Args:
        model: The source, the layer's weights in memory.
        reduced: Skeleton of the result.
        block: The block.
        changed: Its tensors in the result, by parameter name; the down projections among them may be overwritten.
        seen: Inputs and outputs of the block in the source.
        batcher: Knows the device.

    Returns:
        What the correction did on tokens that it was not fitted to.
    """
    moe = load_reduced(model, reduced, block, changed, batcher.device)
    module = reduced.model.get_submodule(block.experts_path)
    whole = model.is_whole_layer(block)
    observer = rerun(moe, module, seen.calls, SampleObserver, batcher=batcher, whole_layer=whole)
    assert isinstance(observer, SampleObserver)
    old_TH, new_TH = torch.cat(seen.outputs).float(), torch.cat(observer.outputs).float()
    held_out = max(1, len(old_TH) // HELD_OUT_SHARE)
    fitted = len(old_TH) - held_out
    tokens, index = torch.cat(observer.tokens), torch.cat(observer.top_k).long().to(batcher.device)
    weights, residual_TH = torch.cat(observer.weights), (old_TH - new_TH).to(batcher.device)
    parts = [
        NeuronSample(experts=experts_of(module), tokens_TH=tokens[part], index_TK=index[part], weight_TK=weights[part])
        for part in (slice(None, fitted), slice(fitted, None))
    ]
    prefix = f"{block.experts_path}."
    rows = {tensor.name.removeprefix(prefix): tensor.split(changed[tensor.name])[0] for tensor in block.experts}
    (down_CIH,) = neurons_of(module, rows).outputs
    start_CIH = down_CIH.to(batcher.device)
    fitted_CIH = fit_down(parts[0], residual_TH[:fitted], start_CIH)
    left_TH = residual_TH[fitted:] - routed_output(parts[1], fitted_CIH - start_CIH.float())
    target_TH = old_TH[fitted:]
    before = relative_error([target_TH], [target_TH - residual_TH[fitted:].cpu()])
    after = relative_error([target_TH], [target_TH - left_TH.cpu()])
    free(moe)
    if after < before:
        # A view of the tensor in ``changed``, whatever its layout.
        down_CIH.copy_(fitted_CIH)
    return CorrectionReport(
        is_kept=after < before,
        error_before=before,
        error_after=after,
        fitted_tokens=fitted,
        held_out_tokens=held_out,
    )
