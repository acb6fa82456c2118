"""The least-squares refit of one layer: down projections alone, or in turn with the input matrices."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

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
        fit = ExpertFit.of(layer, reduced, seen)
        before = best = fit.error()
        kept = 0
        for number, _ in enumerate(_rounds(what, fit, seed), 1):
            found = fit.error()
            if found < best:
                best, kept = found, number
                for name, values in fit.parameters.items():
                    changed[name].copy_(values)
            elif number - kept >= PATIENCE:
                break
    return RefitReport(
        is_kept=kept > 0,
        error_before=before,
        error_after=best,
        fitted_tokens=len(fit.fitted),
        held_out_tokens=len(fit.held_out),
        rounds=kept,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertFit:
    """The experts of a reduced block in float32, and what they are fitted to and judged by.

    Attributes:
        parameters: Tensors of the experts, by parameter name; written to.
        down_CIH: View of their down projections.
        sample: What reaches them.
        wanted_TH: What their neurons must add up to; the biases of the down projections stay.
        old_TH: Routed output of the original block.
        fitted: Tokens to fit to.
        held_out: Tokens to judge by.
    """

    parameters: dict[str, Tensor]
    down_CIH: Tensor
    sample: NeuronSample
    wanted_TH: Tensor
    old_TH: Tensor
    fitted: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, layer: LayerContext, reduced: RunnableBlock, seen: Observation) -> Self:
        """Opens the experts of a reduced block.

        Args:
            layer: The layer.
            reduced: Its block in the result, in memory.
            seen: Inputs of the block, and the routed outputs it is fitted to.
        """
        observer = reduced.rerun(seen.calls, SampleObserver)
        to_float32(reduced.experts.module)
        tensors = {
            tensor.name: reduced.skeleton.module.get_parameter(tensor.name).data for tensor in reduced.block.experts
        }
        down_CIH = down_projections(reduced, tensors)
        sample = NeuronSample(
            experts=reduced.experts,
            tokens_TH=torch.cat(observer.tokens).float(),
            index_TK=torch.cat(observer.top_k).long().to(layer.device),
            weight_TK=torch.cat(observer.weights),
        )
        old_TH, new_TH = (torch.cat(outputs).to(layer.device).float() for outputs in (seen.outputs, observer.outputs))
        split = split_tokens(len(old_TH), seen.domains)
        fitted, held_out = (tokens.to(layer.device) for tokens in (split.fitted, split.judged))
        return cls(
            parameters=tensors,
            down_CIH=down_CIH,
            sample=sample,
            wanted_TH=old_TH - new_TH + routed_output(sample, down_CIH),
            old_TH=old_TH,
            fitted=fitted,
            held_out=held_out,
        )

    def error(self) -> float:
        """Relative error of the routed output on held-out tokens."""
        size = float(self.old_TH[self.held_out].norm())
        if not size:
            return 0.0
        found_TH = routed_output(self.sample.part(self.held_out), self.down_CIH)
        return float((self.wanted_TH[self.held_out] - found_TH).norm()) / size


def down_projections(block: RunnableBlock, tensors: Mapping[str, Tensor]) -> Tensor:
    """View ``[C, I, H]`` of the down projections in a block's tensors, given by parameter name."""
    layout = block.block
    rows = {layout.name_in_experts(tensor): tensor.split(tensors[tensor.name])[0] for tensor in layout.experts}
    (down_CIH,) = block.experts.neurons(rows).outputs
    return down_CIH


def _rounds(what: Refit, fit: ExpertFit, seed: int) -> Iterator[None]:
    """Changes the experts in place, and pauses after every round so that they can be judged."""
    sample, wanted_TH, down_CIH = fit.sample.part(fit.fitted), fit.wanted_TH[fit.fitted], fit.down_CIH
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
