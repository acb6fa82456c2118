"""The refit of a whole block: router and experts of one reduced block, in one pass of Adam over calibration text.

It is gradient descent, but within one block: no gradient ever passes from one layer to another.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.layer.refit_down import domain_errors, to_float32
from hcsmoe_hub.layer.refit_routing import Routing, routing_of
from hcsmoe_hub.layer.trained_experts import TrainedExperts
from hcsmoe_hub.machine.device import compute_dtype
from hcsmoe_hub.methods.refit.descent import Adam, Schedule, corrected
from hcsmoe_hub.methods.refit.guard import Verdict, thinned
from hcsmoe_hub.methods.refit.held_out import Split, split_tokens
from hcsmoe_hub.model.router import router_bias, router_weight
from hcsmoe_hub.observation.runnable_block import RunnableBlock
from hcsmoe_hub.observation.watcher import Observation
from hcsmoe_hub.report import RefitReport

# Shares of the schedule after which the fit is judged, and of its changes that are tried at the end.
JUDGED_AFTER = (0.5, 0.75, 1.0)
STRENGTHS = (0.8, 0.6, 0.4, 0.2)
# Tokens that are judged at once.
CHUNK_TOKENS = 2048


@dataclass(slots=True, kw_only=True, eq=False)
class _Fit:
    """A reduced block that is fitted to the routed output of the original one.

    Attributes:
        routing: What reaches the experts.
        experts: The experts.
        parameters: All trained parameters, by name in the result.
        fan_ins: Number of inputs behind each of them.
        wanted_TH: Routed output of the original block, on the CPU.
        split: Which tokens are fitted.
        judged: Tokens that judge the fit, by domain.
        size: Mean square of it over the fitted tokens.
    """

    routing: Routing
    experts: TrainedExperts
    parameters: dict[str, nn.Parameter]
    fan_ins: dict[str, int]
    wanted_TH: Tensor
    split: Split
    judged: Mapping[str, Tensor]
    size: float

    @classmethod
    @contextmanager
    def of(cls, reduced: RunnableBlock, seen: Observation) -> Iterator[Self]:
        """Opens a block for training.

        Args:
            reduced: The block; becomes float32.
            seen: Its inputs, and the routed outputs it is fitted to.
        """
        to_float32(reduced.moe)
        with routing_of(reduced, seen.calls) as routing:
            experts = TrainedExperts(reduced, compute_dtype(reduced.device))
            parameters, fan_ins = dict(experts.parameters), experts.fan_ins()
            for name, parameter in (_router(reduced) if routing.is_live else {}).items():
                parameter.requires_grad_(True)
                parameters[name] = parameter
                fan_ins[name] = experts.hidden_size
            wanted_TH = torch.cat(seen.outputs)
            split = split_tokens(len(wanted_TH), seen.domains)
            yield cls(
                routing=routing,
                experts=experts,
                parameters=parameters,
                fan_ins=fan_ins,
                wanted_TH=wanted_TH,
                split=split,
                judged=thinned(split.held_out),
                size=sum(_square(part) for part in wanted_TH.split(CHUNK_TOKENS)) / len(wanted_TH),
            )
            for parameter in parameters.values():
                parameter.requires_grad_(False)
                parameter.grad = None

    def output(self, tokens: Tensor) -> Tensor:
        """Routed output on some tokens."""
        return self.experts(self.routing.route(tokens))

    def loss(self, tokens: Tensor) -> Tensor:
        """Squared error of the routed output on some tokens, as a share of the original's mean square."""
        wanted_TH = self.wanted_TH[tokens].to(self.routing.device).float()
        return (self.output(tokens) - wanted_TH).square().sum() / (len(tokens) * self.size)

    def verdict(self) -> Verdict:
        """Errors on the held-out tokens."""
        self.experts.refresh()
        wrong: dict[str, float] = {}
        size: dict[str, float] = {}
        with torch.no_grad():
            for name, part in self.judged.items():
                losses = [self.loss(tokens) * len(tokens) * self.size for tokens in part.split(CHUNK_TOKENS)]
                wrong[name] = float(torch.stack(losses).sum())
                size[name] = sum(_square(self.wanted_TH[tokens]) for tokens in part.split(CHUNK_TOKENS))
        return Verdict.of(wrong, size)


def _square(values: Tensor) -> float:
    return float(values.float().square().sum())


def _router(reduced: RunnableBlock) -> dict[str, nn.Parameter]:
    """Weight and bias of the router's linear layer, by name; empty where not all of its rows belong to experts.

    What sends tokens to no expert at all is not part of the routed output, so its rows would drift unseen.
    """
    block, module = reduced.block, reduced.skeleton.module
    weight = router_weight(block, reduced.skeleton.state)
    if weight is None or weight.extra_rows:
        return {}
    bias = router_bias(block, weight)
    return {tensor.name: module.get_parameter(tensor.name) for tensor in (weight, bias) if tensor is not None}


class _Best:
    """The parameters whose worst domain has come nearest to the original block so far.

    Args:
        before: Errors before the fit.
        changed: The block's tensors in the result; written to by ``keep``.
    """

    def __init__(self, before: Verdict, changed: Mapping[str, Tensor]) -> None:
        self.before = self.verdict = before
        self.ratio, self.steps, self.strength = 1.0, 0, 0.0
        self._changed = changed
        self._kept: dict[str, Tensor] = {}

    def offer(self, fit: _Fit, *, steps: int, strength: float = 1.0) -> bool:
        """Takes what the parameters are now, if that is better."""
        verdict = fit.verdict()
        ratio = verdict.worst(self.before)
        if not ratio < self.ratio:
            return False
        self.verdict, self.ratio, self.steps, self.strength = verdict, ratio, steps, strength
        for name, parameter in fit.parameters.items():
            stored = self._changed[name]
            kept = self._kept.setdefault(name, torch.empty_like(stored))
            kept.copy_(parameter.detach())
        return True

    def keep(self) -> None:
        """Writes the best parameters to the result."""
        for name, values in self._kept.items():
            self._changed[name].copy_(values)


def refit_block(
    layer: LayerContext, changed: Mapping[str, Tensor], *, passes: int, seen: Observation, seed: int
) -> RefitReport:
    """Adam on the squared error of the block's routed output.

    Arguments are those of ``refit_layer``. What is kept is the state during the descent, or between its end and the
    start, whose worst domain has the least error on held-out text; nothing if that is the start.
    """
    with layer.reduced(changed) as reduced, _Fit.of(reduced, seen) as fit:
        best = _Best(fit.verdict(), changed)
        steps = _descend(fit, Schedule.over(len(fit.split.fitted), passes=passes), seed, best)
        _pull_back(fit, changed, steps, best)
        best.keep()
    return RefitReport(
        is_kept=best.steps > 0,
        error_before=best.before.overall,
        error_after=best.verdict.overall,
        fitted_tokens=len(fit.split.fitted),
        held_out_tokens=sum(map(len, fit.judged.values())),
        rounds=0,
        steps=best.steps,
        strength=best.strength if best.steps else None,
        domains=domain_errors(best.before, best.verdict),
    )


def _descend(fit: _Fit, schedule: Schedule, seed: int, best: _Best) -> int:
    """Takes all steps of a schedule, judging now and then; returns their number."""
    adam = Adam({parameter: fit.fan_ins[name] for name, parameter in fit.parameters.items()}, schedule)
    marks = {max(1, round(share * schedule.steps)) for share in JUDGED_AFTER}
    for number, places in enumerate(schedule.batches(seed)):
        fit.experts.refresh()
        fit.experts.clear(fit.parameters)
        tokens = fit.split.fitted[places]
        with torch.enable_grad():
            fit.loss(tokens).backward()
        if number == 0:
            adam.scale(corrected(_change(fit, tokens, adam)))
        adam.step(number)
        if number + 1 in marks:
            best.offer(fit, steps=number + 1)
    return schedule.steps


def _change(fit: _Fit, tokens: Tensor, adam: Adam) -> float:
    """What a step of the highest rate along the signs of the gradient changes of the pre-activations, as a share."""
    rates = dict(zip(fit.parameters, adam.rates, strict=True))
    return fit.experts.change(fit.routing.route(tokens), rates)


def _pull_back(fit: _Fit, changed: Mapping[str, Tensor], steps: int, best: _Best) -> None:
    """Tries shorter ways from the start to where the descent has ended, as long as each is better than the one before.

    Text of other kinds than the calibration text may be better off with less of a fit.
    """
    reached = 1.0
    for strength in STRENGTHS:
        for name, parameter in fit.parameters.items():
            start = changed[name].to(parameter.device, parameter.dtype)
            parameter.detach().lerp_(start, 1 - strength / reached)
        reached = strength
        if not best.offer(fit, steps=steps, strength=strength):
            return
