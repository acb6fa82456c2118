"""One pass of Adam over calibration tokens: how many steps, on which tokens, and how long each of them is."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hcsmoe_hub.methods.totals import root_mean_square

BATCH_TOKENS = 512
# Fewer tokens than this many batches are cut into smaller ones.
LEAST_STEPS = 32
# Rate of a batch of ``BATCH_TOKENS``, as a share of the root mean square of a tensor, times the root of its fan-in.
RATE = 0.6
WARM_UP = 0.05
BETAS = (0.9, 0.99)
# Gradients of blocks with small outputs are tiny, and Adam must still see their direction. What is far smaller than the
# rest of a tensor's gradient is rounding, as in the router's rows of experts that no token has chosen: Adam would take
# steps of full length along it.
EPSILON = 1e-12
ROUNDING = 1e-4
# What one step along the signs of a gradient should change of the pre-activations, and by how much it may be off.
CHANGE = 0.06
TOLERANCE = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Batches and rates of a descent.

    Attributes:
        tokens: Tokens that are fitted.
        batch: Tokens of one step.
        passes: How often every token is seen.
    """

    tokens: int
    batch: int
    passes: int

    @classmethod
    def over(cls, tokens: int, *, passes: int) -> "Schedule":
        """The schedule for so many tokens; at least one step long."""
        return cls(tokens=tokens, batch=max(1, min(BATCH_TOKENS, tokens // LEAST_STEPS)), passes=passes)

    @property
    def steps(self) -> int:
        """Steps of all passes."""
        return self.passes * (self.tokens // self.batch)

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Token numbers of every step, int64, without replacement within a pass.

        A rest that is smaller than a batch is left out, so that all steps are alike.
        """
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.passes):
            order = torch.randperm(self.tokens, generator=generator)
            yield from order[: self.tokens // self.batch * self.batch].split(self.batch)

    def rate(self, fan_in: int) -> float:
        """Highest rate of a tensor, as a share of its root mean square."""
        return RATE / math.sqrt(fan_in) * math.sqrt(self.batch / BATCH_TOKENS)

    def height(self, step: int) -> float:
        """Share of the highest rate that a step has: a short rise, then a straight line down to 0.

        Args:
            step: From 0 on.
        """
        done = (step + 1) / self.steps
        return done / WARM_UP if done < WARM_UP else 1 - (done - WARM_UP) / (1 - WARM_UP)


class Adam:
    """Adam whose rates are shares of the size that tensors have at the beginning.

    Args:
        fan_ins: Number of inputs that the rows of each parameter multiply, by parameter.
        schedule: Batches and rates.
    """

    def __init__(self, fan_ins: Mapping[nn.Parameter, int], schedule: Schedule) -> None:
        self._schedule = schedule
        # Brought to the host together: it waits for the device each time.
        sizes = torch.stack([root_mean_square(parameter.detach()) for parameter in fan_ins]).tolist()
        self._rates = [schedule.rate(fan_in) * size for fan_in, size in zip(fan_ins.values(), sizes, strict=True)]
        groups = [{"params": [parameter]} for parameter in fan_ins]
        self._optimizer = torch.optim.Adam(groups, lr=0.0, betas=BETAS, eps=EPSILON, fused=True)

    @property
    def rates(self) -> Sequence[float]:
        """Highest rate of every parameter."""
        return self._rates

    def scale(self, factor: float) -> None:
        """Makes all steps to come longer or shorter."""
        self._rates = [rate * factor for rate in self._rates]

    def step(self, number: int) -> None:
        """Takes a step along the gradients that the parameters have.

        Args:
            number: From 0 on.
        """
        if number == 0:
            self._ignore_rounding()
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._schedule.height(number)
        self._optimizer.step()

    def _ignore_rounding(self) -> None:
        """Measures the first gradients, so that steps along far smaller ones become short."""
        groups = self._optimizer.param_groups
        sizes = torch.stack([root_mean_square(_gradient_of(group["params"][0])) for group in groups]).tolist()
        for group, size in zip(groups, sizes, strict=True):
            group["eps"] = max(EPSILON, ROUNDING * size)


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def corrected(change: float) -> float:
    """What to multiply all rates by, from the measured change of pre-activations by one step of the highest rate.

    The rule of fan-in is right within a factor for the widths that it was found on; others are brought back to
    ``CHANGE`` where it is far off.
    """
    if not 0 < change < math.inf or CHANGE / TOLERANCE <= change <= CHANGE * TOLERANCE:
        return 1.0
    return CHANGE / change
