"""The fit by hand: targets, losses whose slope is the score, and rows that meet their targets."""

import pytest
import torch
from torch import Tensor

from hcsmoe_hub.methods.clustering.clusters import Clusters
from hcsmoe_hub.methods.routing import Scoring, WeightRule, fit_rows, group_targets, mismatch
from hcsmoe_hub.methods.routing.scoring import scores

TOKENS, FEATURES, GROUPS = 4000, 6, 3
NOTHING = torch.zeros(TOKENS, 0)
CLUSTERS = Clusters.of([0, 1, 0, 2])
LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0], [0.0, 3.0, -2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
INDEX = torch.tensor([[0, 2], [1, 3], [-1, 3]])
SHARES, MASSES = WeightRule(Scoring.SOFTMAX, True), WeightRule(Scoring.SOFTMAX, False)


def targets(rule: WeightRule, clusters: Clusters = CLUSTERS, extra: Tensor = LOGITS[:, :0]) -> Tensor:
    """Targets of the three tokens."""
    return group_targets(LOGITS, extra, INDEX, rule, clusters)[0]


# Targets


def test_shares_of_a_token_go_to_its_chosen_groups_alone() -> None:
    odds = LOGITS[1].exp()
    expected = [[1, 0, 0], [0, odds[1] / (odds[1] + odds[3]), odds[3] / (odds[1] + odds[3])], [0, 0, 1]]
    torch.testing.assert_close(targets(SHARES), torch.tensor(expected))


def test_probabilities_of_chosen_groups_stay_and_the_others_get_the_rest() -> None:
    mass = LOGITS.softmax(1)
    found = targets(MASSES)
    torch.testing.assert_close(found.sum(1), torch.ones(3))
    torch.testing.assert_close(found[0, 0], mass[0, 0] + mass[0, 2])
    torch.testing.assert_close(found[1, 1:], mass[1, [1, 3]])
    torch.testing.assert_close(found[2], torch.tensor([0.5, 0.25, 0.25]))


def test_where_every_group_was_chosen_the_rest_goes_to_them_in_proportion() -> None:
    found, _ = group_targets(LOGITS[1:2], LOGITS[:1, :0], INDEX[1:2], MASSES, Clusters.of([0, 0, 0, 1]))
    mass = LOGITS[1].softmax(0)
    torch.testing.assert_close(found[0], mass[[1, 3]] / (mass[1] + mass[3]))


def test_rows_of_no_expert_keep_their_probability() -> None:
    extra = torch.tensor([[1.0], [0.0], [-1.0]])
    free = 1 - torch.cat([LOGITS, extra], 1).softmax(1)[:, 4]
    torch.testing.assert_close(targets(MASSES, extra=extra).sum(1), free)


@pytest.mark.parametrize("is_share", [True, False])
def test_independent_scores_of_chosen_members_add_up_to_one_at_most(is_share: bool) -> None:
    score = LOGITS.sigmoid()
    assert float(score[0, 0] + score[0, 2]) > 1
    expected = torch.tensor([[1, 0, 0], [0, score[1, 1], score[1, 3]], [0, 0, score[2, 3]]])
    torch.testing.assert_close(targets(WeightRule(Scoring.SIGMOID, is_share)), expected)


def test_unbounded_scores_are_not_cut() -> None:
    score = scores(LOGITS, LOGITS[:, :0], Scoring.ROOT_SOFTPLUS).float()
    assert targets(WeightRule(Scoring.ROOT_SOFTPLUS, True))[0, 0] == score[0, 0] + score[0, 2] > 1


@pytest.mark.parametrize("rule", [SHARES, MASSES, WeightRule(Scoring.SIGMOID, True)])
def test_a_token_whose_choices_were_all_dropped_has_no_target(rule: WeightRule) -> None:
    found, has_target = group_targets(LOGITS, LOGITS[:, :0], INDEX, rule, Clusters.of([-1, 0, -1, 1]))
    assert found.shape == (3, 2)
    assert has_target.tolist() == [False, True, True]
    assert found.isfinite().all()


# Loss


@pytest.mark.parametrize("scoring", Scoring)
@pytest.mark.parametrize("extra", [0, 2])
def test_the_slope_of_the_loss_is_the_score_less_the_target(scoring: Scoring, extra: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(5, GROUPS, generator=generator)).requires_grad_()
    target, more = torch.rand(5, GROUPS, generator=generator), torch.randn(5, extra, generator=generator)
    # Libraries that other tests import switch gradients off for the whole process.
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(mismatch(logits, target, scoring, more), logits)
    expected = (scores(logits.detach(), more, scoring) - target) / 5
    torch.testing.assert_close(slope, expected.float(), rtol=1e-4, atol=1e-4)


# Rows


def problem(scoring: Scoring, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of very different sizes, true rows and bias, and the scores that they give."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-2, 2, FEATURES)
    inputs = torch.randn(TOKENS, FEATURES, generator=generator) * size
    rows = torch.randn(GROUPS, FEATURES, generator=generator) / size / FEATURES**0.5
    bias = torch.randn(GROUPS, generator=generator) / 2
    target = scores(inputs @ rows.T + bias, NOTHING, scoring).float()
    return inputs, rows, bias, target


def fitted(scoring: Scoring, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores to reach, scores at the start, scores after the fit."""
    inputs, rows, bias, target = problem(scoring, seed)
    start, zero = rows.roll(1, 0).bfloat16(), torch.zeros_like(bias)
    found, shift = fit_rows(inputs, target, start, zero, scoring=scoring, extra_TX=NOTHING)
    assert shift is not None
    before, after = inputs @ start.float().T, inputs @ found.T + shift
    return target, scores(before, NOTHING, scoring).float(), scores(after, NOTHING, scoring).float()


@pytest.mark.parametrize("scoring", Scoring)
@pytest.mark.parametrize("seed", range(3))
def test_scores_that_rows_can_give_are_met_from_any_start(scoring: Scoring, seed: int) -> None:
    target, before, after = fitted(scoring, seed)
    assert float((after - target).abs().mean()) < 0.25 * float((before - target).abs().mean())


@pytest.mark.parametrize("scoring", Scoring)
def test_the_fit_is_the_same_every_time(scoring: Scoring) -> None:
    assert torch.equal(fitted(scoring, 0)[2], fitted(scoring, 0)[2])


@pytest.mark.parametrize("scoring", Scoring)
def test_rows_that_meet_their_targets_stay(scoring: Scoring) -> None:
    inputs, rows, _, _ = problem(scoring, 0)
    target = scores(inputs @ rows.T, NOTHING, scoring).float()
    found, bias = fit_rows(inputs, target, rows, None, scoring=scoring, extra_TX=NOTHING)
    assert bias is None
    torch.testing.assert_close(
        found * inputs.square().mean(0).sqrt(), rows * inputs.square().mean(0).sqrt(), atol=1e-3, rtol=0
    )


def test_a_feature_that_is_always_zero_keeps_its_weights() -> None:
    inputs, rows, _, target = problem(Scoring.SIGMOID, 0)
    inputs[:, 2] = 0
    found, _ = fit_rows(inputs, target, rows, None, scoring=Scoring.SIGMOID, extra_TX=NOTHING)
    assert torch.equal(found[:, 2], rows[:, 2])
    assert found.isfinite().all()


def test_fewer_tokens_than_features_give_rows_that_are_finite_and_near_the_start() -> None:
    inputs, rows, _, _ = problem(Scoring.SOFTMAX, 0)
    target = torch.tensor([[1.0, 0.0, 0.0]])
    found, _ = fit_rows(inputs[:1], target, rows, None, scoring=Scoring.SOFTMAX, extra_TX=NOTHING[:1])
    logits = torch.stack([inputs[0] @ each.T for each in (rows, found)])
    assert found.isfinite().all()
    assert logits.softmax(1)[1, 0] > logits.softmax(1)[0, 0]
