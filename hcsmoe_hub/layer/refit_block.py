"""The refit of a whole block: router and experts of one reduced block, optimised on calibration text.

It is gradient descent, but within one block: no gradient ever passes from one layer to another.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.layer.refit_experts import to_float32
from hcsmoe_hub.methods.refit.cost import BLOCK_STEP_TOKENS, BLOCK_STEPS
from hcsmoe_hub.methods.refit.held_out import split_tokens
from hcsmoe_hub.observation.observers import RoutedObserver
from hcsmoe_hub.observation.runnable_block import RunnableBlock
from hcsmoe_hub.observation.statistics import Call, pick_tokens
from hcsmoe_hub.observation.watcher import Observation
from hcsmoe_hub.report import RefitReport

# Largest change per step, as a share of the root mean square of each tensor.
RATE = 0.03
JUDGED_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Learner:
    """A reduced block in float32, and the original one's output for the tokens of its calls."""

    reduced: RunnableBlock
    calls: list[Call]
    old_TH: Tensor

    def _place(self, values: Tensor) -> Tensor:
        return values.to(self.reduced.device, torch.float32 if values.is_floating_point() else values.dtype)

    def loss(self, tokens: Tensor) -> Tensor:
        """Squared error of the routed output on some tokens, as a share of the original's square."""
        call, moe, observer = pick_tokens(self.calls, tokens), self.reduced.moe, RoutedObserver()
        args, kwargs = recursively_apply(self._place, (call.args, dict(call.kwargs)))
        with self.reduced.experts.observing(moe, observer):
            moe(*args, **kwargs)
        old_TH = self.old_TH[tokens].to(self.reduced.device).float()
        return (observer.outputs[0].to(self.reduced.device) - old_TH).square().sum() / old_TH.square().sum()


def refit_block(
    layer: LayerContext, changed: Mapping[str, Tensor], *, first: RefitReport, seen: Observation, seed: int
) -> RefitReport:
    """Adam on the squared error of the block's routed output, from where least squares left it.

    Arguments are those of ``refit_layer``, with the report of the refit before. Dropped where it does not lower the
    error on held-out tokens.
    """
    with layer.reduced(changed) as reduced:
        state = dict(to_float32(reduced.moe).named_parameters(prefix=layer.block.path))
        tensors = (*layer.block.experts, *layer.block.router)
        trained = {tensor.name: state[tensor.name] for tensor in tensors if tensor.name in state}
        learner = _Learner(reduced=reduced, calls=seen.calls, old_TH=torch.cat(seen.outputs))
        split = split_tokens(len(learner.old_TH), seen.domains)
        fitted, held_out = split.fitted, split.judged
        held_out = held_out[:: max(1, len(held_out) // JUDGED_TOKENS)]
        with torch.no_grad():
            before = float(learner.loss(held_out))
        _descend(learner, list(trained.values()), fitted, seed)
        with torch.no_grad():
            after = float(learner.loss(held_out))
            if after < before:
                for name, values in trained.items():
                    changed[name].copy_(values)
    if not after < before:
        return first
    return replace(first, is_kept=True, steps=BLOCK_STEPS, error_after=after**0.5)


def _descend(learner: _Learner, parameters: list[nn.Parameter], fitted: Tensor, seed: int) -> None:
    """Adam with a rate that rises and falls once, on seeded samples of the fitted tokens."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.requires_grad_(True)
    rates = [RATE * float(parameter.detach().square().mean().sqrt()) for parameter in parameters]
    optimizer = torch.optim.Adam([{"params": [parameter]} for parameter in parameters])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=BLOCK_STEPS + 1, pct_start=0.1)
    with torch.enable_grad():
        for _ in range(BLOCK_STEPS):
            optimizer.zero_grad()
            chosen = torch.randperm(len(fitted), generator=generator)[:BLOCK_STEP_TOKENS].sort().values
            learner.loss(fitted[chosen]).backward()
            optimizer.step()
            schedule.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
