"""Which rule a router follows is inferred from what it did, whatever factor and rows of no expert are in it."""

import pytest
import torch
from torch import Tensor

from hcsmoe_hub.methods.routing import Scoring, WeightRule, find_rule
from hcsmoe_hub.methods.routing.scoring import RULES, scores

TOKENS, EXPERTS, TOP_K = 200, 7, 3


def routed(rule: WeightRule, seed: int, *, extra: int = 0, top_k: int = TOP_K) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, those of rows of no expert, choices and weights of a router in bfloat16, its weights times 2.5."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(TOKENS, EXPERTS, generator=generator)
    more = torch.randn(TOKENS, extra, generator=generator)
    index = (logits + torch.randn(EXPERTS, generator=generator)).topk(top_k, dim=1).indices
    weight = scores(logits, more, rule.scoring).gather(1, index)
    if rule.is_share:
        weight = weight / weight.sum(1, keepdim=True)
    return logits, more, index, (2.5 * weight).bfloat16()


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("extra", [0, 1])
def test_every_rule_is_recognised_by_the_weights_that_it_gave(rule: WeightRule, seed: int, extra: int) -> None:
    assert find_rule(*routed(rule, seed, extra=extra)) == rule


@pytest.mark.parametrize("scoring", Scoring)
def test_one_choice_with_a_weight_of_its_own_shows_the_scoring(scoring: Scoring) -> None:
    rule = WeightRule(scoring, is_share=False)
    assert find_rule(*routed(rule, 0, top_k=1)) == rule


@pytest.mark.parametrize("scoring", Scoring)
def test_one_choice_that_always_weighs_the_same_is_a_share_of_a_softmax(scoring: Scoring) -> None:
    assert find_rule(*routed(WeightRule(scoring, is_share=True), 0, top_k=1)) == WeightRule(Scoring.SOFTMAX, True)


def test_choices_of_no_expert_say_nothing() -> None:
    rule = WeightRule(Scoring.SIGMOID, is_share=True)
    logits, extra, index, weight = routed(rule, 0)
    index[::2] = -1
    weight[::2] = 100
    assert find_rule(logits, extra, index, weight) == rule


def test_a_softmax_counts_the_rows_of_no_expert_in() -> None:
    logits, extra = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
    found = scores(logits, extra, Scoring.SOFTMAX)
    assert found.shape == (1, 2)
    torch.testing.assert_close(found, torch.cat([logits, extra], 1).double().softmax(1)[:, :2])
