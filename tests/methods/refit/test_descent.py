"""The schedule of a descent, the length of its steps, and what of it is kept."""

import math

import pytest
import torch
from torch import nn

from hcsmoe_hub.methods.refit.descent import CHANGE, RATE, Adam, Schedule, corrected
from hcsmoe_hub.methods.refit.guard import Verdict, thinned


def test_every_token_is_seen_once_per_pass() -> None:
    schedule = Schedule.over(512 * 40, passes=2)
    batches = list(schedule.batches(0))
    assert len(batches) == schedule.steps == 80
    assert {len(batch) for batch in batches} == {512}
    for half in (batches[:40], batches[40:]):
        assert torch.equal(torch.cat(half).sort().values, torch.arange(512 * 40))
    assert not torch.equal(batches[0], batches[40])


@pytest.mark.parametrize(("tokens", "batch", "steps"), [(1, 1, 1), (20, 1, 20), (896, 28, 32), (14336, 448, 32)])
def test_few_tokens_are_cut_into_small_batches(tokens: int, batch: int, steps: int) -> None:
    schedule = Schedule.over(tokens, passes=1)
    assert (schedule.batch, schedule.steps) == (batch, steps)


def test_the_seed_alone_decides_the_order() -> None:
    first, again, other = (torch.cat(list(Schedule.over(4096, passes=1).batches(seed))) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rates_rise_for_a_twentieth_and_then_fall_to_nothing() -> None:
    schedule = Schedule(tokens=512 * 200, batch=512, passes=1)
    heights = [schedule.height(step) for step in range(200)]
    top = heights.index(max(heights))
    assert heights[:10] == sorted(heights[:10])
    assert top in (9, 10)
    assert heights[top:] == sorted(heights[top:], reverse=True)
    assert math.isclose(max(heights), 1, abs_tol=0.01)
    assert math.isclose(heights[-1], 0, abs_tol=1e-9)


def test_rates_follow_fan_in_and_batch() -> None:
    assert Schedule(tokens=1 << 20, batch=512, passes=1).rate(144) == RATE / 12
    assert Schedule(tokens=1 << 20, batch=128, passes=1).rate(144) == RATE / 24


def test_one_step_moves_every_weight_by_the_rate() -> None:
    parameter = nn.Parameter(torch.tensor([[3.0, -4.0], [0.0, 0.0]]))
    schedule = Schedule(tokens=512, batch=512, passes=1)
    adam = Adam({parameter: 2}, schedule)
    (rate,) = adam.rates
    assert math.isclose(rate, schedule.rate(2) * 2.5, rel_tol=1e-6)
    before = parameter.detach().clone()
    # However small they are.
    parameter.grad = torch.tensor([[1e-8, -2e-8], [0.0, 5e-9]])
    adam.scale(2.0)
    adam._schedule = Schedule(tokens=512 * 20, batch=512, passes=1)
    adam.step(0)
    moved = (before - parameter.detach()) / (2 * rate)
    torch.testing.assert_close(moved, torch.tensor([[1.0, -1.0], [0.0, 1.0]]), rtol=1e-3, atol=0)


def test_rounding_in_a_gradient_is_not_taken_for_a_direction() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    adam = Adam({parameter: 2}, Schedule(tokens=512, batch=512, passes=1))
    adam._schedule = Schedule(tokens=512 * 20, batch=512, passes=1)
    # The second row is that of an expert which no token has chosen: a softmax leaves some rounding there.
    parameter.grad = torch.tensor([[0.1, -0.2], [3e-9, -5e-9]])
    adam.step(0)
    moved = (parameter.detach() - 1).abs()
    assert moved[1].max() < 1e-3 * moved[0].min()


@pytest.mark.parametrize(
    ("change", "factor"),
    [(CHANGE, 1.0), (CHANGE * 3, 1.0), (CHANGE / 3, 1.0), (0.0, 1.0), (math.inf, 1.0), (math.nan, 1.0)],
)
def test_steps_of_about_the_right_length_stay(change: float, factor: float) -> None:
    assert corrected(change) == factor


@pytest.mark.parametrize("change", [CHANGE * 10, CHANGE / 10])
def test_steps_that_are_far_too_long_or_short_are_corrected(change: float) -> None:
    assert math.isclose(change * corrected(change), CHANGE)


def test_a_fit_is_judged_by_its_worst_domain() -> None:
    size = {"a": 100.0, "b": 1.0}
    before = Verdict.of({"a": 25.0, "b": 0.25}, size)
    after = Verdict.of({"a": 1.0, "b": 0.36}, size)
    assert before.domains == {"a": 0.5, "b": 0.5}
    assert after.overall < before.overall
    assert math.isclose(after.worst(before), 1.2)
    assert before.worst(before) == 1.0


def test_a_fit_that_is_not_finite_is_the_worst() -> None:
    before = Verdict.of({"": 1.0}, {"": 4.0})
    assert Verdict.of({"": math.nan}, {"": 4.0}).worst(before) == math.inf
    assert Verdict.of({"": math.inf}, {"": 4.0}).worst(before) == math.inf


def test_a_block_without_output_has_no_error() -> None:
    nothing = Verdict.of({"": 0.0}, {"": 0.0})
    assert (nothing.overall, nothing.worst(nothing)) == (0.0, 1.0)


def test_judging_tokens_are_thinned_evenly_and_every_domain_keeps_some() -> None:
    parts = {"long": torch.arange(1000), "short": torch.arange(1000, 1003)}
    found = thinned(parts, 100)
    assert len(found["long"]) + len(found["short"]) <= 102
    assert len(found["short"]) >= 1
    assert thinned(parts, 5000)["long"].equal(parts["long"])
