"""The least-squares refit of one layer: the down projections of its experts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.methods.refit.down_projections import fit_down, routed_output
from hcsmoe_hub.methods.refit.guard import Verdict
from hcsmoe_hub.methods.refit.held_out import split_tokens
from hcsmoe_hub.observation.observers import SampleObserver
from hcsmoe_hub.observation.runnable_block import RunnableBlock
from hcsmoe_hub.observation.sample import NeuronSample
from hcsmoe_hub.observation.watcher import Observation
from hcsmoe_hub.report import ErrorChange, RefitReport


def refit_down(layer: LayerContext, changed: Mapping[str, Tensor], *, seen: Observation) -> RefitReport:
    """Solves for the down projections of a reduced block, and keeps them if they help every domain of held-out text.

    Arguments are those of ``refit_layer``.
    """
    with layer.reduced(changed) as reduced, torch.no_grad():
        fit = ExpertFit.of(layer, reduced, seen)
        before = fit.verdict()
        fit.down_CIH.copy_(fit_down(fit.sample.part(fit.fitted), fit.wanted_TH[fit.fitted], fit.down_CIH))
        after = fit.verdict()
        is_kept = after.worst(before) < 1
        if is_kept:
            for name, values in fit.parameters.items():
                changed[name].copy_(values)
    found = after if is_kept else before
    return RefitReport(
        is_kept=is_kept,
        error_before=before.overall,
        error_after=found.overall,
        fitted_tokens=len(fit.fitted),
        held_out_tokens=sum(map(len, fit.held_out.values())),
        rounds=int(is_kept),
        strength=1.0 if is_kept else None,
        domains=domain_errors(before, found),
    )


def domain_errors(before: Verdict, after: Verdict) -> dict[str, ErrorChange]:
    """Errors by domain before and after a fit; empty where domains are unknown."""
    return {
        name: ErrorChange(before=error, after=after.domains[name]) for name, error in before.domains.items() if name
    }


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
        held_out: Tokens to judge by, by domain.
    """

    parameters: dict[str, Tensor]
    down_CIH: Tensor
    sample: NeuronSample
    wanted_TH: Tensor
    old_TH: Tensor
    fitted: Tensor
    held_out: Mapping[str, Tensor]

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
        return cls(
            parameters=tensors,
            down_CIH=down_CIH,
            sample=sample,
            wanted_TH=old_TH - new_TH + routed_output(sample, down_CIH),
            old_TH=old_TH,
            fitted=split.fitted.to(layer.device),
            held_out={name: part.to(layer.device) for name, part in split.held_out.items()},
        )

    def verdict(self) -> Verdict:
        """Errors of the routed output on held-out tokens."""
        wrong, size = {}, {}
        for name, part in self.held_out.items():
            found_TH = routed_output(self.sample.part(part), self.down_CIH)
            wrong[name] = float((self.wanted_TH[part] - found_TH).square().sum())
            size[name] = float(self.old_TH[part].square().sum())
        return Verdict.of(wrong, size)


def down_projections(block: RunnableBlock, tensors: Mapping[str, Tensor]) -> Tensor:
    """View ``[C, I, H]`` of the down projections in a block's tensors, given by parameter name."""
    layout = block.block
    rows = {layout.name_in_experts(tensor): tensor.split(tensors[tensor.name])[0] for tensor in layout.experts}
    (down_CIH,) = block.experts.neurons(rows).outputs
    return down_CIH


def to_float32(module: nn.Module) -> nn.Module:
    """Gives a module float32 parameters and buffers in memory of their own, and returns it.

    On a CPU the tensors of a loaded block may be those of the result, or of the source: a fit that is dropped must
    leave no trace in them.
    """
    for values in (*module.parameters(), *module.buffers()):
        if values.is_floating_point():
            values.data = values.data.to(torch.float32, copy=True)
    return module
