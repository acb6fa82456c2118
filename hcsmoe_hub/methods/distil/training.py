"""Gradient descent of a reduced model on the distance of its next-token distribution from that of its source.

N pieces of L tokens, B pieces of one step, V entries of the vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import isfinite

import torch
from torch import Tensor, nn

from hcsmoe_hub.methods.distil.losses import divergence
from hcsmoe_hub.methods.distil.text import Pieces
from hcsmoe_hub.methods.totals import root_mean_square

# Token ids [B, L] to logits [B, L, V].
Model = Callable[[Tensor], Tensor]

# Tokens of one step, and of all of them; short texts are seen so many times at most.
STEP_TOKENS = 1024
VISITED_TOKENS = 224 * STEP_TOKENS
MOST_PASSES = 2
WARM_UP = 0.05
BETAS = (0.9, 0.99)
# Far below any gradient: the size of a step must not depend on the scale of the loss.
EPSILON = 1e-12
# How far the training has come when it is judged.
JUDGED_AT = (0.5, 0.75, 1.0)
# Size of the largest step as a share of the root mean square of each tensor: the least where a few experts were
# dropped, the most where half of them or more were.
LEAST_RATE, MOST_RATE = 0.003, 0.01


def rates_for(experts_left: float) -> list[float]:
    """Largest steps to try for a model that kept a share of its experts, until one is not dropped.

    The more experts were lost, the farther there is to go; but a model that is near its source all the same is only led
    away by large steps.
    """
    lost = min(1.0, max(0.0, (0.75 - experts_left) / 0.25))
    rate = LEAST_RATE + (MOST_RATE - LEAST_RATE) * lost
    return [rate] if rate == LEAST_RATE else [rate, LEAST_RATE]


def step_pieces(pieces: int, length: int) -> int:
    """B."""
    return min(pieces, max(1, STEP_TOKENS // length))


def step_count(pieces: int, length: int) -> int:
    """Steps of a training on so many pieces."""
    visits = min(VISITED_TOKENS, MOST_PASSES * pieces * length)
    return max(1, visits // (step_pieces(pieces, length) * length))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trained:
    """A parameter that is trained.

    Attributes:
        parameter: The parameter, in the dtype that the model is computed in; written to.
        start: Its first values, on the CPU and in the dtype that they are stored in: what is judged is rounded to it.
    """

    parameter: nn.Parameter
    start: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pair:
    """A reduced model, which computes with the parameters that are trained, and its source."""

    student: Model
    teacher: Model

    def divergence(self, ids_BL: Tensor) -> Tensor:
        """Sum over tokens of the KL divergence of the student from the teacher, in nats."""
        with torch.no_grad():
            wanted_BLV = self.teacher(ids_BL)
        return divergence(self.student(ids_BL), wanted_BLV)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Training:
    """What a training did.

    Attributes:
        values: The values that were kept, or the first ones, in the order of the parameters, each as its ``start``.
        kept: Steps until the values that were kept; 0 if none was better.
        steps: Steps that were made.
        before: Mean KL divergence per token from the source, in nats, by domain.
        after: The same with what was kept.
    """

    values: Sequence[Tensor]
    kept: int
    steps: int
    before: Mapping[str, float]
    after: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Progress:
    """How far a training has come: everything that its remaining steps depend on, but for the model and the text.

    Attributes:
        steps: Steps that were made; at least 1.
        masters: Values of the parameters, float32, on the device of each.
        moments: What Adam keeps of each parameter that has had a gradient, by the parameter's number and by name.
        before: Mean KL divergence per token of the first values, in nats, by domain.
        after: The same with the best values so far.
        lowest: Greatest share of its first divergence that a domain keeps with them; 1 if nothing was better yet.
        kept: Steps until them; 0 if nothing was better yet.
        best: These values, each as its ``start``; empty if nothing was better yet.
    """

    steps: int
    masters: Sequence[Tensor]
    moments: Mapping[int, Mapping[str, Tensor]]
    before: Mapping[str, float]
    after: Mapping[str, float]
    lowest: float
    kept: int
    best: Sequence[Tensor]


class Trainer:
    """Adam with float32 masters, one rise and one fall of the rate; the best values for the worst domain are kept.

    Values are better if the greatest share of its divergence that any domain keeps is smaller; with no share below 1
    the first values stay. A training that goes on from its ``progress`` ends in the same bits.

    Args:
        pair: The reduced model and its source.
        trained: The parameters.
        pieces: Text to train on, and text that judges.
        rate: Largest step, as a share of each parameter's root mean square.
        seed: Of the order of the text.
    """

    def __init__(self, pair: Pair, trained: Sequence[Trained], pieces: Pieces, *, rate: float, seed: int) -> None:
        self._pair = pair
        self._trained = trained
        self._pieces = pieces
        self._rate = rate
        self._seed = seed
        self._masters = [each.start.to(each.parameter.device, torch.float32, copy=True) for each in trained]
        self._optimizer = torch.optim.Adam(
            [
                {"params": [master], "size": size}
                for master, size in zip(self._masters, _sizes(self._masters), strict=True)
            ],
            betas=BETAS,
            eps=EPSILON,
            # One pass over the memory of an accelerator; on a CPU the steps stay what they were.
            fused=all(master.device.type != "cpu" for master in self._masters),
        )
        self._steps = self._kept = 0
        self._lowest = 1.0
        self._best: Sequence[Tensor] = [each.start for each in trained]
        self._before: Mapping[str, float] = {}
        self._after: Mapping[str, float] = {}

    def progress(self) -> Progress:
        """How far the training has come; the tensors are its own, and change with the next step."""
        state = self._optimizer.state
        return Progress(
            steps=self._steps,
            masters=self._masters,
            moments={number: state[master] for number, master in enumerate(self._masters) if master in state},
            before=self._before,
            after=self._after,
            lowest=self._lowest,
            kept=self._kept,
            best=self._best if self._kept else [],
        )

    def go_on_from(self, progress: Progress) -> None:
        """Continues a training of the same parameters on the same text, with the same rate and seed.

        Args:
            progress: How far it had come; its tensors may be taken over.
        """
        for master, value in zip(self._masters, progress.masters, strict=True):
            master.copy_(value)
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": progress.moments, "param_groups": groups})
        self._steps, self._kept, self._lowest = progress.steps, progress.kept, progress.lowest
        self._before, self._after = progress.before, progress.after
        if progress.kept:
            self._best = progress.best
        _set(self._trained, self._masters)

    def run(self, on_step: Callable[[], None] = lambda: None) -> Training:
        """Makes the remaining steps.

        Args:
            on_step: Called after every step, and after the judgement that may follow it.
        """
        if self._steps == 0:
            _set(self._trained, self._best)
            self._before = self._after = _judge(self._pair, self._pieces)
        pieces_NL = self._pieces.fitted_NL
        steps = step_count(*pieces_NL.shape)
        judged_at = {max(1, round(share * steps)) for share in JUDGED_AT}
        for ids_BL in islice(_batches(pieces_NL, steps, self._seed), self._steps, None):
            self._steps += 1
            for group in self._optimizer.param_groups:
                group["lr"] = self._rate * _schedule(self._steps, steps) * group["size"]
            _step(self._pair, self._trained, self._masters, self._optimizer, ids_BL)
            if self._steps in judged_at:
                self._judge()
            on_step()
        return Training(values=self._best, kept=self._kept, steps=steps, before=self._before, after=self._after)

    def _judge(self) -> None:
        """Keeps the values that have been reached if they are better than any before."""
        pairs = list(zip(self._trained, self._masters, strict=True))
        # With what would be stored.
        _set(self._trained, [master.to(each.start.dtype) for each, master in pairs])
        found = _judge(self._pair, self._pieces)
        if (share := _worst_share(self._before, found)) < self._lowest:
            reached = [master.to("cpu", each.start.dtype, copy=True) for each, master in pairs]
            # What judging text does not reach may have overflowed unseen.
            if all(bool(bound.isfinite()) for values in reached for bound in values.aminmax()):
                self._lowest, self._kept, self._after, self._best = share, self._steps, found, reached
        _set(self._trained, self._masters)


def _sizes(masters: Sequence[Tensor]) -> list[float]:
    """Root mean squares, brought to the host together."""
    sizes: list[float] = torch.stack([root_mean_square(master) for master in masters]).tolist()
    return sizes


def _batches(pieces_NL: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Seeded batches; every piece comes once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    size = step_pieces(*pieces_NL.shape)
    rounds = -(-steps * size // len(pieces_NL))
    order = torch.cat([torch.randperm(len(pieces_NL), generator=generator) for _ in range(rounds)])
    for step in range(steps):
        yield pieces_NL[order[step * size : (step + 1) * size]]


def _schedule(number: int, steps: int) -> float:
    """Share of the largest rate in step 1, 2, ...: a short linear rise, then a linear fall to nearly 0."""
    rise = max(1, round(WARM_UP * steps))
    return min(number / rise, (steps - number + 1) / max(1, steps - rise + 1))


def _step(
    pair: Pair,
    trained: Sequence[Trained],
    masters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    ids_BL: Tensor,
) -> None:
    with torch.enable_grad():
        (pair.divergence(ids_BL) / ids_BL.numel()).backward()
    for each, master in zip(trained, masters, strict=True):
        # An expert that no token was routed to has none.
        gradient = each.parameter.grad
        master.grad = None if gradient is None else gradient.float()
        each.parameter.grad = None
    optimizer.step()
    for master in masters:
        master.grad = None
    _set(trained, masters)


def _set(trained: Sequence[Trained], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for each, value in zip(trained, values, strict=True):
            each.parameter.copy_(value)


@torch.no_grad()
def _judge(pair: Pair, pieces: Pieces) -> dict[str, float]:
    """Mean divergence per token by domain."""
    found = {}
    for domain, pieces_NL in pieces.judged.items():
        size = step_pieces(*pieces_NL.shape)
        sums = torch.stack([pair.divergence(ids_BL) for ids_BL in pieces_NL.split(size)]).tolist()
        found[domain] = sum(sums) / pieces_NL.numel()
    return found


def _worst_share(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """The greatest share of its first divergence that a domain keeps; infinite for what is not a number."""
    shares = [after[domain] / max(before[domain], 1e-9) for domain in before]
    return max(shares) if all(map(isfinite, shares)) else float("inf")
