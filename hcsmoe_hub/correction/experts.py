"""The least-squares correction of one layer: down projections alone, or in turn with the input matrices."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from hcsmoe_hub.checkpoint.layers import free
from hcsmoe_hub.checkpoint.microbatch import MicroBatcher
from hcsmoe_hub.checkpoint.skeleton import Skeleton
from hcsmoe_hub.correction.held_out import split_tokens
from hcsmoe_hub.correction.widen import widen
from hcsmoe_hub.measure import load_reduced
from hcsmoe_hub.merging.fit_experts import fit_experts
from hcsmoe_hub.merging.least_squares import fit_down, routed_output
from hcsmoe_hub.model import Model
from hcsmoe_hub.moe.blocks import MoEBlock
from hcsmoe_hub.moe.experts import experts_of
from hcsmoe_hub.moe.neurons import neurons_of
from hcsmoe_hub.moe.observer import SampleObserver
from hcsmoe_hub.moe.sample import NeuronSample
from hcsmoe_hub.observation import Observation, rerun
from hcsmoe_hub.options import Correct
from hcsmoe_hub.report import CorrectionReport

# Rounds without a lower error on held-out tokens after which a layer has what it can get.
PATIENCE = 3


def correct_experts(
    what: Correct,
    model: Model,
    reduced: Skeleton,
    block: MoEBlock,
    changed: Mapping[str, Tensor],
    seen: Observation,
    batcher: MicroBatcher,
    *,
    seed: int,
) -> CorrectionReport:
    """Fits the experts of a reduced block in a few rounds, and keeps the one with the least error on held-out tokens.

    Arguments are those of ``correct``; the router stays as it is.
    """
    moe = load_reduced(model, reduced, block, changed, batcher.device)
    module = reduced.model.get_submodule(block.experts_path)
    whole = model.is_whole_layer(block)
    observer = rerun(moe, module, seen.calls, SampleObserver, batcher=batcher, whole_layer=whole)
    assert isinstance(observer, SampleObserver)
    parameters, down_CIH = _open(widen(module), block)
    sample = NeuronSample(
        experts=experts_of(module),
        tokens_TH=torch.cat(observer.tokens).float(),
        index_TK=torch.cat(observer.top_k).long().to(batcher.device),
        weight_TK=torch.cat(observer.weights),
    )
    old_TH, new_TH = (torch.cat(outputs).to(batcher.device).float() for outputs in (seen.outputs, observer.outputs))
    # What the neurons must add up to: biases behind them stay.
    wanted_TH = old_TH - new_TH + routed_output(sample, down_CIH)
    fitted, held_out = (tokens.to(batcher.device) for tokens in split_tokens(len(old_TH)))
    judge, judged_TH, size = sample.part(held_out), wanted_TH[held_out], float(old_TH[held_out].norm())

    def error() -> float:
        return float((judged_TH - routed_output(judge, down_CIH)).norm()) / size if size else 0.0

    before = best = error()
    kept = 0
    with torch.no_grad():
        rounds = _rounds(what, sample.part(fitted), wanted_TH[fitted], down_CIH, seed)
        for number, _ in enumerate(rounds, 1):
            found = error()
            if found < best:
                best, kept = found, number
                for name, values in parameters.items():
                    changed[name].copy_(values)
            elif number - kept >= PATIENCE:
                break
    free(moe)
    return CorrectionReport(
        is_kept=kept > 0,
        error_before=before,
        error_after=best,
        fitted_tokens=len(fitted),
        held_out_tokens=len(held_out),
        rounds=kept,
    )


def _open(module: nn.Module, block: MoEBlock) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of the experts by parameter name, and a view ``[C, I, H]`` of their down projections."""
    local = {tensor: tensor.name.removeprefix(f"{block.experts_path}.") for tensor in block.experts}
    values = {tensor: module.get_parameter(name).data for tensor, name in local.items()}
    (down_CIH,) = neurons_of(module, {local[tensor]: tensor.split(held)[0] for tensor, held in values.items()}).outputs
    return {tensor.name: held for tensor, held in values.items()}, down_CIH


def _rounds(what: Correct, sample: NeuronSample, wanted_TH: Tensor, down_CIH: Tensor, seed: int) -> Iterator[None]:
    """Changes the experts in place, and stops after every round for them to be judged."""
    down_CIH.copy_(fit_down(sample, wanted_TH, down_CIH))
    yield
    if what is Correct.EXPERTS:
        for _ in fit_experts(sample, wanted_TH, down_CIH, seed=seed):
            yield
