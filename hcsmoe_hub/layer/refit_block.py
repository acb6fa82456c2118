"""Layer-local reconstruction: router and experts of one reduced block, optimised on calibration text.

It is gradient descent, but within one block: nothing is ever propagated from one layer to another.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from hcsmoe_hub.layer.reduced_block import load_reduced
from hcsmoe_hub.layer.refit_experts import to_float32
from hcsmoe_hub.methods.refit.cost import BLOCK_STEP_TOKENS, BLOCK_STEPS
from hcsmoe_hub.methods.refit.held_out import split_tokens
from hcsmoe_hub.model.blocks import MoEBlock
from hcsmoe_hub.model.experts import observe, stop_observing
from hcsmoe_hub.model.layer_loader import free
from hcsmoe_hub.model.microbatch import MicroBatcher
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.observation.observers import RoutedObserver
from hcsmoe_hub.observation.statistics import Call, pick_tokens
from hcsmoe_hub.observation.watcher import Observation
from hcsmoe_hub.report import RefitReport

# Largest change per step, as a share of the root mean square of each tensor.
RATE = 0.03
JUDGED_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Block:
    """A reduced block in float32, and what the original one gave for the tokens of its calls."""

    moe: nn.Module
    experts: nn.Module
    calls: list[Call]
    old_TH: Tensor
    device: torch.device

    def _place(self, values: Tensor) -> Tensor:
        return values.to(self.device, torch.float32 if values.is_floating_point() else values.dtype)

    def loss(self, tokens: Tensor) -> Tensor:
        """Squared error of the routed output on some tokens, as a share of the original's square."""
        call = pick_tokens(self.calls, tokens)
        args, kwargs = recursively_apply(self._place, (call.args, dict(call.kwargs)))
        observer = RoutedObserver()
        observe(self.moe, self.experts, observer)
        try:
            self.moe(*args, **kwargs)
        finally:
            stop_observing(self.moe, self.experts)
        old_TH = self.old_TH[tokens].to(self.device).float()
        return (observer.outputs[0].to(self.device) - old_TH).square().sum() / old_TH.square().sum()


def reconstruct(
    first: RefitReport,
    model: SourceModel,
    reduced: Skeleton,
    block: MoEBlock,
    changed: Mapping[str, Tensor],
    seen: Observation,
    batcher: MicroBatcher,
    *,
    seed: int,
) -> RefitReport:
    """Adam on the squared error of the block's routed output, from where least squares left it.

    Arguments are those of ``refit_layer``, with the report of the refit before. Dropped where it does not lower the
    error on held-out tokens.
    """
    moe = to_float32(load_reduced(model, reduced, block, changed, batcher.device))
    state = {name: value for name, value in moe.named_parameters(prefix=block.path)}
    trained = {tensor.name: state[tensor.name] for tensor in (*block.experts, *block.router) if tensor.name in state}
    learner = _Block(
        moe=moe,
        experts=reduced.module.get_submodule(block.experts_path),
        calls=seen.calls,
        old_TH=torch.cat(seen.outputs),
        device=batcher.device,
    )
    fitted, held_out = split_tokens(len(learner.old_TH))
    held_out = held_out[:: max(1, len(held_out) // JUDGED_TOKENS)]
    with torch.no_grad():
        before = float(learner.loss(held_out))
    _descend(learner, list(trained.values()), fitted, seed)
    with torch.no_grad():
        after = float(learner.loss(held_out))
        if after < before:
            for name, values in trained.items():
                changed[name].copy_(values)
    free(moe)
    if not after < before:
        return first
    return replace(first, is_kept=True, steps=BLOCK_STEPS, error_after=after**0.5)


def _descend(learner: _Block, parameters: list[nn.Parameter], fitted: Tensor, seed: int) -> None:
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
