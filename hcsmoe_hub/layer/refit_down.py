"""The least-squares refit of one layer: the down projections of its experts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.machine.accelerator import free_bytes, is_host
from hcsmoe_hub.machine.precision import fast_products
from hcsmoe_hub.machine.smaller_pieces import and_host, first_that_fits
from hcsmoe_hub.methods.refit.down_projections import KEPT_BYTES, fit_down, routed_output
from hcsmoe_hub.methods.refit.guard import Verdict
from hcsmoe_hub.methods.refit.held_out import OwnTokens, Split, split_tokens
from hcsmoe_hub.methods.refit.sums import sums_of
from hcsmoe_hub.methods.totals import total
from hcsmoe_hub.observation.observers import SampleObserver
from hcsmoe_hub.observation.runnable_block import RunnableBlock
from hcsmoe_hub.observation.sample import NeuronSample
from hcsmoe_hub.observation.watcher import Observation
from hcsmoe_hub.report import ErrorChange, RefitReport

# The part of the free memory of an accelerator that features may fill, and as much again the factors of equations.
KEPT_SHARE = 4


def refit_down(layer: LayerContext, changed: Mapping[str, Tensor], *, seen: Observation) -> RefitReport:
    """Solves for the down projections of a reduced block, and keeps them if they help every domain of held-out text.

    Arguments are those of ``refit_layer``.
    """
    with layer.reduced(changed) as reduced, torch.no_grad(), fast_products(layer.device):
        fit = ExpertFit.of(layer, reduced, seen)
        before = fit.verdict()
        fit.solve()
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
        fitted_tokens=len(fit.split.fitted),
        held_out_tokens=sum(map(len, fit.split.held_out.values())),
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
        wanted_TH: What their neurons must add up to, float32; the biases of the down projections stay.
        old_TH: Routed output of the original block.
        split: Which tokens of all ranks are fitted, and which judge.
        own: The tokens that this rank holds: those of the sample.
    """

    parameters: dict[str, Tensor]
    down_CIH: Tensor
    sample: NeuronSample
    wanted_TH: Tensor
    old_TH: Tensor
    split: Split
    own: OwnTokens

    @classmethod
    def of(cls, layer: LayerContext, reduced: RunnableBlock, seen: Observation) -> "ExpertFit":
        """Opens the experts of a reduced block: on the device, or on the host if they do not fit there.

        Args:
            layer: The layer.
            reduced: Its block in the result, in memory.
            seen: Inputs of the block, and the routed outputs it is fitted to.
        """
        observer = reduced.rerun(seen.calls, SampleObserver)
        own = OwnTokens.of(sum(map(len, seen.outputs)), layer.device)

        def attempt(device: torch.device) -> "ExpertFit":
            return cls._on(device, reduced, seen, observer, own)

        return first_that_fits(attempt, and_host(layer.device), layer.device)

    @classmethod
    def _on(
        cls, device: torch.device, reduced: RunnableBlock, seen: Observation, observer: SampleObserver, own: OwnTokens
    ) -> Self:
        to_float32(reduced.experts.module, device)
        tensors = {
            tensor.name: reduced.skeleton.module.get_parameter(tensor.name).data for tensor in reduced.block.experts
        }
        down_CIH = down_projections(reduced, tensors)
        sample = NeuronSample(
            experts=reduced.experts,
            tokens_TH=torch.cat(observer.tokens).to(device),
            index_TK=torch.cat(observer.top_k).to(device).long(),
            weight_TK=torch.cat(observer.weights).to(device),
        )
        old_TH = torch.cat(seen.outputs).to(device)
        # Added up in place: each of these is as large as the hidden states in float32.
        wanted_TH = old_TH.to(torch.float32, copy=True)
        wanted_TH -= torch.cat(observer.outputs).to(device).float()
        wanted_TH += routed_output(sample, down_CIH)
        return cls(
            parameters=tensors,
            down_CIH=down_CIH,
            sample=sample,
            wanted_TH=wanted_TH,
            old_TH=old_TH,
            split=split_tokens(own.total, seen.domains),
            own=own,
        )

    @property
    def fitted(self) -> tuple[NeuronSample, Tensor]:
        """What reaches the experts on the tokens to fit to, and what is wanted there."""
        tokens = self.own.part(self.split.fitted).to(self.wanted_TH.device)
        return self.sample.part(tokens), self.wanted_TH[tokens]

    @property
    def kept_bytes(self) -> int:
        """Memory that a fit may fill with what it would otherwise compute again, twice."""
        device = self.wanted_TH.device
        return KEPT_BYTES if is_host(device) else free_bytes(device) // KEPT_SHARE

    def solve(self) -> None:
        """Fits the down projections, in place."""
        sample, wanted_TH = self.fitted
        self.down_CIH.copy_(fit_down(sample, wanted_TH, self.down_CIH, kept_bytes=self.kept_bytes))

    def verdict(self) -> Verdict:
        """Errors of the routed output on held-out tokens."""
        device = self.wanted_TH.device
        sums = []
        for part in self.split.held_out.values():
            tokens = self.own.part(part).to(device)
            found_TH = routed_output(self.sample.part(tokens), self.down_CIH)
            wrong = total((self.wanted_TH[tokens] - found_TH).square())
            sums += [[wrong], [total(self.old_TH[tokens].float().square())]]
        found = sums_of(sums, device)
        names = self.split.held_out
        return Verdict.of(
            wrong=dict(zip(names, found[::2], strict=True)), size=dict(zip(names, found[1::2], strict=True))
        )


def down_projections(block: RunnableBlock, tensors: Mapping[str, Tensor]) -> Tensor:
    """View ``[C, I, H]`` of the down projections in a block's tensors, given by parameter name."""
    layout = block.block
    rows = {layout.name_in_experts(tensor): tensor.split(tensors[tensor.name])[0] for tensor in layout.experts}
    (down_CIH,) = block.experts.neurons(rows).outputs
    return down_CIH


def to_float32(module: nn.Module, device: torch.device) -> nn.Module:
    """Gives a module float32 parameters and buffers in memory of their own on a device, and returns it.

    On a CPU the tensors of a loaded block may be those of the result, or of the source: a fit that is dropped must
    leave no trace in them.
    """

    def wide(values: Tensor) -> Tensor:
        return values.detach().to(values.device if values.is_meta else device, torch.float32, copy=True)

    # Replaced rather than changed: not every accelerator can give a tensor of the host memory of its own.
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                child._parameters[name] = nn.Parameter(wide(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                child._buffers[name] = wide(buffer)
    return module
