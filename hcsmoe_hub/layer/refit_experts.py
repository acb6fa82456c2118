"""The least-squares refit of one layer: down projections alone, or in turn with the input matrices."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.methods.refit.down_projections import fit_down, routed_output
from hcsmoe_hub.methods.refit.experts import fit_experts
from hcsmoe_hub.methods.refit.held_out import split_tokens
from hcsmoe_hub.observation.observers import SampleObserver
from hcsmoe_hub.observation.runnable_block import RunnableBlock
from hcsmoe_hub.observation.sample import NeuronSample
from hcsmoe_hub.observation.watcher import Observation
from hcsmoe_hub.options import Refit
from hcsmoe_hub.report import RefitReport

# Rounds without a lower error on held-out tokens after which no better one is expected.
PATIENCE = 3


def refit_experts(
    layer: LayerContext, changed: Mapping[str, Tensor], *, what: Refit, seen: Observation, seed: int
) -> RefitReport:
    """Fits the experts of a reduced block in a few rounds, and keeps the one with the least error on held-out tokens.

    Arguments are those of ``refit_layer``; the router stays as it is.
    """
    with layer.reduced(changed) as reduced, torch.no_grad():
        observer = reduced.rerun(seen.calls, SampleObserver)
        parameters, down_CIH = _open(reduced)
        sample = NeuronSample(
            experts=reduced.experts,
            tokens_TH=torch.cat(observer.tokens).float(),
            index_TK=torch.cat(observer.top_k).long().to(layer.device),
            weight_TK=torch.cat(observer.weights),
        )
        old_TH, new_TH = (torch.cat(outputs).to(layer.device).float() for outputs in (seen.outputs, observer.outputs))
        # What the neurons must add up to; the biases of the down projections stay.
        wanted_TH = old_TH - new_TH + routed_output(sample, down_CIH)
        fitted, held_out = (tokens.to(layer.device) for tokens in split_tokens(len(old_TH)))
        judge, judged_TH, size = sample.part(held_out), wanted_TH[held_out], float(old_TH[held_out].norm())

        def error() -> float:
            return float((judged_TH - routed_output(judge, down_CIH)).norm()) / size if size else 0.0

        before = best = error()
        kept = 0
        rounds = _rounds(what, sample.part(fitted), wanted_TH[fitted], down_CIH, seed)
        for number, _ in enumerate(rounds, 1):
            found = error()
            if found < best:
                best, kept = found, number
                for name, values in parameters.items():
                    changed[name].copy_(values)
            elif number - kept >= PATIENCE:
                break
    return RefitReport(
        is_kept=kept > 0,
        error_before=before,
        error_after=best,
        fitted_tokens=len(fitted),
        held_out_tokens=len(held_out),
        rounds=kept,
    )


def _open(reduced: RunnableBlock) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of the experts in float32 by parameter name, and a view ``[C, I, H]`` of their down projections."""
    block, experts = reduced.block, reduced.experts
    to_float32(experts.module)
    values = {tensor: reduced.skeleton.module.get_parameter(tensor.name).data for tensor in block.experts}
    rows = {block.name_in_experts(tensor): tensor.split(held)[0] for tensor, held in values.items()}
    (down_CIH,) = experts.neurons(rows).outputs
    return {tensor.name: held for tensor, held in values.items()}, down_CIH


def _rounds(what: Refit, sample: NeuronSample, wanted_TH: Tensor, down_CIH: Tensor, seed: int) -> Iterator[None]:
    """Changes the experts in place, and pauses after every round so that they can be judged."""
    down_CIH.copy_(fit_down(sample, wanted_TH, down_CIH))
    yield
    if what is Refit.EXPERTS:
        for _ in fit_experts(sample, wanted_TH, down_CIH, seed=seed):
            yield


def to_float32(module: nn.Module) -> nn.Module:
    """Gives a module float32 parameters and buffers in memory of their own, and returns it.

    On a CPU the tensors of a loaded block may be those of the result, or of the source: a fit that is dropped must
    leave no trace in them.
    """
    for values in (*module.parameters(), *module.buffers()):
        if values.is_floating_point():
            values.data = values.data.to(torch.float32, copy=True)
    return module
