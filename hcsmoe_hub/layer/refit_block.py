"""The refit of a whole block: router and experts of one reduced block, in one pass of Adam over calibration text.

It is gradient descent, but within one block: no gradient ever passes from one layer to another.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.layer.refit_down import domain_errors, to_float32
from hcsmoe_hub.layer.refit_routing import Routing, brought, picked, routing_of
from hcsmoe_hub.layer.trained_experts import TrainedExperts
from hcsmoe_hub.machine.accelerator import is_host
from hcsmoe_hub.machine.device import compute_dtype
from hcsmoe_hub.machine.precision import fast_products
from hcsmoe_hub.machine.smaller_pieces import and_host, first_that_fits, halves
from hcsmoe_hub.methods.refit.descent import Adam, Schedule, corrected
from hcsmoe_hub.methods.refit.guard import Verdict, thinned
from hcsmoe_hub.methods.refit.held_out import OwnTokens, Split, split_tokens
from hcsmoe_hub.methods.refit.sums import sums_of
from hcsmoe_hub.methods.totals import total
from hcsmoe_hub.model.router import router_bias, router_weight
from hcsmoe_hub.observation.runnable_block import RunnableBlock
from hcsmoe_hub.observation.watcher import Observation
from hcsmoe_hub.report import RefitReport

# Shares of the schedule after which the fit is judged, and of its changes that are tried at the end.
JUDGED_AFTER = (0.5, 0.75, 1.0)
STRENGTHS = (0.8, 0.6, 0.4, 0.2)
# Tokens that are judged at once, and the fewest where memory runs out.
CHUNK_TOKENS = 2048
LEAST_TOKENS = 32
# What a descent adds to a parameter and its gradient: both moments, a narrower copy for products, the best state.
RESERVED_BYTES = 12


@dataclass(slots=True, kw_only=True, eq=False)
class _Fit:
    """A reduced block that is fitted to the routed output of the original one.

    Attributes:
        routing: What reaches the experts.
        experts: The experts.
        parameters: All trained parameters, by name in the result.
        fan_ins: Number of inputs behind each of them.
        wanted_TH: Routed output of the original block on the tokens of this rank, on the device while it fits there.
        own: Which tokens those are.
        split: Which of all tokens are fitted.
        judged: Tokens that judge the fit, by domain.
        size: Mean square of the output over all tokens.
        device: Where the block is.
        pieces: How many pieces a step is computed in; more where memory has run out.
    """

    routing: Routing
    experts: TrainedExperts
    parameters: dict[str, nn.Parameter]
    fan_ins: dict[str, int]
    wanted_TH: Tensor
    own: OwnTokens
    split: Split
    judged: Mapping[str, Tensor]
    size: float
    device: torch.device
    pieces: int = 1

    @classmethod
    @contextmanager
    def of(cls, reduced: RunnableBlock, seen: Observation) -> Iterator[Self]:
        """Opens a block for training.

        Args:
            reduced: The block; becomes float32.
            seen: Its inputs, and the routed outputs it is fitted to.
        """
        device = reduced.device
        to_float32(reduced.moe, device)
        with fast_products(device), routing_of(reduced, seen.calls) as routing:
            experts = TrainedExperts(reduced, _product_dtype(reduced))
            parameters, fan_ins = dict(experts.parameters), experts.fan_ins()
            for name, parameter in (_router(reduced) if routing.is_live else {}).items():
                parameter.requires_grad_(True)
                parameters[name] = parameter
                fan_ins[name] = experts.hidden_size
            reserved = sum(RESERVED_BYTES * parameter.numel() for parameter in parameters.values())
            wanted_TH = brought(torch.cat(seen.outputs), device, reserved)
            routing.bring(reserved)
            own = OwnTokens.of(len(wanted_TH), device)
            split = split_tokens(own.total, seen.domains)
            (square,) = sums_of([[_square(part) for part in wanted_TH.split(CHUNK_TOKENS)]], device)
            yield cls(
                routing=routing,
                experts=experts,
                parameters=parameters,
                fan_ins=fan_ins,
                wanted_TH=wanted_TH,
                own=own,
                split=split,
                judged={
                    name: own.part(tokens).to(wanted_TH.device) for name, tokens in thinned(split.held_out).items()
                },
                size=square / own.total,
                device=device,
            )
            for parameter in parameters.values():
                parameter.requires_grad_(False)
                parameter.grad = None

    def output(self, tokens: Tensor) -> Tensor:
        """Routed output on some tokens."""
        return self.experts(self.routing.route(tokens))

    def steps(self, schedule: Schedule, seed: int) -> Sequence[Tensor]:
        """The tokens of every step that this rank holds, next to what they are picked from."""
        parts = [self.own.part(self.split.fitted[places]) for places in schedule.batches(seed)]
        return torch.cat(parts).to(self.wanted_TH.device).split([len(part) for part in parts])

    def parts(self, tokens: Tensor) -> Sequence[Tensor]:
        """Tokens of a step in as many pieces as fit into memory one by one."""
        return tokens.split(-(-len(tokens) // self.pieces)) if len(tokens) else ()

    def loss(self, tokens: Tensor, count: int) -> Tensor:
        """What some of the tokens of a step add to its squared error, as a share of the original's mean square.

        Args:
            tokens: Their numbers.
            count: Tokens of the whole step, on all ranks.
        """
        wanted_TH = picked(self.wanted_TH, tokens, self.device).float()
        return total((self.output(tokens) - wanted_TH).square()) / (count * self.size)

    def set_gradients(self, tokens: Tensor, count: int) -> None:
        """The gradients of one step, from smaller and smaller pieces of it while memory runs out.

        Args:
            tokens: The tokens of the step that this rank holds.
            count: Tokens of the whole step.
        """

        def attempt(way: tuple[int, bool]) -> None:
            self.pieces, self.experts.is_grouped = way
            self.experts.clear(self.parameters)
            for part in self.parts(tokens):
                with torch.enable_grad():
                    self.loss(part, count).backward()
                self.experts.adds = True

        # A single token at the end, and one expert after the other.
        more = [self.pieces << number for number in range(max(1, len(tokens)).bit_length() + 1)]
        kinds = [True, False] if self.experts.is_grouped else [False]
        first_that_fits(attempt, [(pieces, kind) for kind in kinds for pieces in more], self.device)
        self.experts.add_up_gradients(self.parameters, has_own=len(tokens) > 0)

    def verdict(self) -> Verdict:
        """Errors on the held-out tokens."""
        self.experts.refresh()

        def attempt(most: int) -> list[list[Tensor]]:
            sums = []
            for part in self.judged.values():
                chunks = part.split(most) if len(part) else ()
                losses = [self.loss(tokens, len(tokens)) * len(tokens) * self.size for tokens in chunks]
                sizes = [_square(picked(self.wanted_TH, tokens, self.device)) for tokens in chunks]
                sums += [[torch.stack(losses).sum()] if losses else [], sizes]
            return sums

        with torch.no_grad():
            sums = first_that_fits(attempt, list(halves(CHUNK_TOKENS, LEAST_TOKENS)), self.device)
        found = sums_of(sums, self.device)
        return Verdict.of(
            wrong=dict(zip(self.judged, found[::2], strict=True)),
            size=dict(zip(self.judged, found[1::2], strict=True)),
        )


def _product_dtype(reduced: RunnableBlock) -> torch.dtype:
    """What the matrices of the experts are multiplied in: narrower ones on an accelerator only where the model is."""
    native = compute_dtype(reduced.device)
    return native if is_host(reduced.device) or reduced.skeleton.dtype is native else torch.float32


def _square(values: Tensor) -> Tensor:
    return total(values.float().square())


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
            if name not in self._kept:
                self._kept[name] = self._room_for(parameter, self._changed[name].dtype)
            self._kept[name].copy_(parameter.detach())
        return True

    @staticmethod
    def _room_for(parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for a parameter, next to it or on the host."""

        def make(device: torch.device) -> Tensor:
            return torch.empty_like(parameter, dtype=dtype, device=device, requires_grad=False)

        return first_that_fits(make, and_host(parameter.device), parameter.device)

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
        held_out_tokens=sum(map(len, thinned(fit.split.held_out).values())),
        rounds=0,
        steps=best.steps,
        strength=best.strength if best.steps else None,
        domains=domain_errors(best.before, best.verdict),
    )


def _descend(fit: _Fit, schedule: Schedule, seed: int, best: _Best) -> int:
    """Takes all steps of a schedule, judging now and then; returns their number."""
    adam = Adam({parameter: fit.fan_ins[name] for name, parameter in fit.parameters.items()}, schedule)
    marks = {max(1, round(share * schedule.steps)) for share in JUDGED_AFTER}
    for number, tokens in enumerate(fit.steps(schedule, seed)):
        fit.experts.refresh()
        fit.set_gradients(tokens, schedule.batch)
        if number == 0:
            adam.scale(corrected(_change(fit, tokens, adam)))
        adam.step(number)
        if number + 1 in marks:
            best.offer(fit, steps=number + 1)
    return schedule.steps


def _change(fit: _Fit, tokens: Tensor, adam: Adam) -> float:
    """What a step of the highest rate along the signs of the gradient changes of the pre-activations, as a share."""
    rates = dict(zip(fit.parameters, adam.rates, strict=True))
    return fit.experts.change([fit.routing.route(part) for part in fit.parts(tokens)], rates)


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
