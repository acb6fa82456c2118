"""Gradient descent of a reduced model on the distance of its next-token distribution from that of its source.

N pieces of L tokens, B pieces of one step, V entries of the vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hcsmoe_hub.methods.distil.text import Pieces

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


def divergence(student_BLV: Tensor, teacher_BLV: Tensor) -> Tensor:
    """Sum over tokens of the KL divergence of two next-token distributions from the teacher's side, in nats."""
    student, teacher = (logits.float().log_softmax(-1) for logits in (student_BLV, teacher_BLV))
    return F.kl_div(student, teacher, log_target=True, reduction="sum")


def train(
    pair: Pair,
    trained: Sequence[Trained],
    pieces: Pieces,
    *,
    rate: float,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> Training:
    """Adam with float32 masters, one rise and one fall of the rate; the best values for the worst domain are kept.

    Values are better if the greatest share of its divergence that any domain keeps is smaller; with no share below 1
    the first values stay.

    Args:
        pair: The reduced model and its source.
        trained: The parameters.
        pieces: Text to train on, and text that judges.
        rate: Largest step, as a share of each parameter's root mean square.
        seed: Of the order of the text.
        on_step: Called after every step.
    """
    masters = [each.start.to(each.parameter.device, torch.float32, copy=True) for each in trained]
    optimizer = torch.optim.Adam(
        [{"params": [master], "size": float(master.square().mean().sqrt())} for master in masters],
        betas=BETAS,
        eps=EPSILON,
    )
    best: Sequence[Tensor] = [each.start for each in trained]
    _set(trained, best)
    before = after = _judge(pair, pieces)
    lowest, kept = 1.0, 0
    steps = step_count(*pieces.fitted_NL.shape)
    judged_at = {max(1, round(share * steps)) for share in JUDGED_AT}
    for number, ids_BL in enumerate(_batches(pieces.fitted_NL, steps, seed), 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * _schedule(number, steps) * group["size"]
        _step(pair, trained, masters, optimizer, ids_BL)
        on_step()
        if number in judged_at:
            # With what would be stored.
            _set(trained, [master.to(each.start.dtype) for each, master in zip(trained, masters, strict=True)])
            found = _judge(pair, pieces)
            if (share := _worst_share(before, found)) < lowest:
                lowest, kept, after = share, number, found
                best = [
                    master.to("cpu", each.start.dtype, copy=True) for each, master in zip(trained, masters, strict=True)
                ]
            _set(trained, masters)
    return Training(values=best, kept=kept, steps=steps, before=before, after=after)


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
        sums = [float(pair.divergence(ids_BL)) for ids_BL in pieces_NL.split(size)]
        found[domain] = sum(sums) / pieces_NL.numel()
    return found


def _worst_share(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """The greatest share of its first divergence that a domain keeps; infinite for what is not a number."""
    shares = [after[domain] / max(before[domain], 1e-9) for domain in before]
    return max(shares) if all(map(isfinite, shares)) else float("inf")
