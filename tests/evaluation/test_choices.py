"""Multiple choice against its definition."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.evaluation.choices import best, choice_pairs, mean_log_likelihoods, measure_choices
from hcsmoe_hub.evaluation.records import read_choices
from hcsmoe_hub.evaluation.tokens import Tokens
from hcsmoe_hub.methods.quality.tally import proportion_error


def nothing():
    pass


@pytest.fixture
def asked(model, questions):
    """The questions, and their pairs of context and choice."""
    tokens = Tokens(LocalSource(model))
    items, _ = read_choices(questions)
    return items, [choice_pairs(item, tokens) for item in items]


def test_scores_are_means_over_the_tokens_of_a_choice(model, asked, loaded):
    pairs = [pair for choices in asked[1] for both in choices for pair in both]
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = mean_log_likelihoods(pairs, loaded, advance=nothing)
    assert found.keys() == set(pairs)
    for before, choice in pairs:
        with torch.no_grad():
            log_probs = reference(torch.tensor([[*before, *choice]])).logits[0].double().log_softmax(-1)
        places = range(len(before) - 1, len(before) + len(choice) - 1)
        wanted = [float(log_probs[place, token]) for place, token in zip(places, choice, strict=True)]
        assert found[before, choice] == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)


def test_accuracy_follows_from_the_scores(asked, loaded):
    items, pairs = asked
    found = mean_log_likelihoods(
        [pair for choices in pairs for both in choices for pair in both], loaded, advance=nothing
    )
    informed, plain = [], []
    for item, choices in zip(items, pairs, strict=True):
        gains = [found[conditional] - found[alone] for conditional, alone in choices]
        informed.append(gains.index(max(gains)) == item.gold)
        scores = [found[conditional] for conditional, _ in choices]
        plain.append(scores.index(max(scores)) == item.gold)
    figures = measure_choices(items, pairs, loaded, advance=nothing)
    assert figures["overall"]["accuracy"] == pytest.approx(sum(informed) / 12)
    assert figures["overall"]["plain_accuracy"] == pytest.approx(sum(plain) / 12)
    assert figures["domains"]["code"]["accuracy"] == pytest.approx(sum(informed[::2]) / 6)
    assert [figures["domains"][domain]["items"] for domain in ("code", "prose")] == [6, 6]


def test_streamed_accuracy_is_the_same_as_in_memory(asked, loaded, streamed):
    assert measure_choices(*asked, streamed, advance=nothing) == measure_choices(*asked, loaded, advance=nothing)


def test_equal_sequences_are_computed_once(asked, loaded):
    pairs = [asked[1][0][0][0]] * 3
    calls = []
    mean_log_likelihoods(pairs, loaded, advance=lambda: calls.append(None))
    assert len(calls) == 1


def test_lowest_index_wins_a_tie():
    assert best([0.0, 2.0, 2.0]) == 1


def test_standard_error_is_that_of_the_sample():
    outcomes = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    assert proportion_error(0.75, 4) == pytest.approx(float(outcomes.std() / 4**0.5))
    assert proportion_error(1.0, 1) is None
