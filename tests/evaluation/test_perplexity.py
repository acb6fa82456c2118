"""Perplexity and agreement against their definitions, computed token by token."""

import math
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import VerificationError
from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.evaluation.perplexity import cut_windows, measure_text
from hcsmoe_hub.evaluation.records import read_texts
from hcsmoe_hub.evaluation.scorers import LoadedScorer, StreamedScorer
from hcsmoe_hub.evaluation.tokens import Tokens
from hcsmoe_hub.methods.quality.agreement import Agreement, divergence

CPU = torch.device("cpu")
WINDOW = 16


def windows(folder, words, window=WINDOW):
    return cut_windows(read_texts(words)[0], Tokens(LocalSource(folder)), window=window)


def nothing():
    pass


def test_every_token_but_the_first_is_predicted_once(model, words):
    tokens = Tokens(LocalSource(model))
    records, _ = read_texts(words)
    for record in records:
        cut = cut_windows([record], tokens, window=WINDOW)
        assert [token for window in cut for token in window.ids[1:]] == tokens.encode(record.text)
        assert cut[0].ids[0] == tokens.first
        assert all(before.ids[-1] == after.ids[0] for before, after in pairwise(cut))
        assert max(len(window.ids) for window in cut) <= WINDOW + 1


def test_window_that_ends_with_the_text_is_the_last(model, words):
    records, _ = read_texts(words)
    assert [len(window.ids) for window in cut_windows(records[:1], Tokens(LocalSource(model)), window=25)] == [26, 26]


def test_perplexity_is_that_of_the_definition(model, words, loaded):
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sums: dict[str, list[float]] = {}
    for window in windows(model, words):
        with torch.no_grad():
            log_probs = reference(torch.tensor([window.ids[:-1]])).logits[0].double().log_softmax(-1)
        losses = [-float(log_probs[place, token]) for place, token in enumerate(window.ids[1:])]
        for domain in (window.domain, "overall"):
            sums.setdefault(domain, []).extend(losses)
    found = measure_text(windows(model, words), loaded, None, advance=nothing)
    assert (found["base"], found["agreement"]) == (None, None)
    figures = {**found["model"]["domains"], "overall": found["model"]["overall"]}
    assert figures.keys() == sums.keys() == {"prose", "code", "overall"}
    for domain, losses in sums.items():
        assert figures[domain]["tokens"] == len(losses)
        assert figures[domain]["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
        assert figures[domain]["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)


def test_streamed_figures_are_the_same_as_in_memory(model, base, words, loaded, streamed):
    cut = windows(model, words)
    bases = [kind(Checkpoint(LocalSource(base)), CPU) for kind in (LoadedScorer, StreamedScorer)]
    here = measure_text(cut, loaded, bases[0], advance=nothing)
    there = measure_text(cut, streamed, bases[1], advance=nothing)
    for measure in ("model", "base", "agreement"):
        assert there[measure]["overall"] == pytest.approx(here[measure]["overall"], rel=1e-4, abs=1e-6)
        for domain, row in here[measure]["domains"].items():
            assert there[measure]["domains"][domain] == pytest.approx(row, rel=1e-4, abs=1e-6)


def test_model_agrees_with_itself(model, words, loaded, streamed):
    figures = measure_text(windows(model, words), loaded, streamed, advance=nothing)
    assert figures["agreement"]["overall"]["top1_agreement"] == 1
    assert figures["agreement"]["overall"]["kl"] == pytest.approx(0, abs=1e-6)
    assert figures["base"]["overall"] == pytest.approx(figures["model"]["overall"], rel=1e-5)


def test_gradients_are_computed_as_before_after_two_models_took_turns(model, words, loaded, streamed):
    measure_text(windows(model, words), loaded, streamed, advance=nothing)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("seed", range(3))
def test_divergence_is_that_of_the_base_from_the_model(seed):
    ours, theirs = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p, q = theirs.softmax(-1), ours.softmax(-1)
    wanted = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(divergence(ours, theirs), wanted, rtol=1e-4, atol=1e-5)
    assert (divergence(theirs, ours) - wanted).abs().min() > 1e-3


def test_agreement_counts_equal_first_choices():
    agreement = Agreement()
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    agreement.add("prose", logits, torch.tensor([[0.0, 2.0], [0.0, 2.0], [0.0, 2.0]]))
    agreement.add(None, logits[:1], logits[:1])
    figures = agreement.figures()
    assert figures["domains"]["prose"]["top1_agreement"] == pytest.approx(2 / 3)
    assert figures["overall"]["top1_agreement"] == pytest.approx(3 / 4)
    assert (figures["domains"]["prose"]["tokens"], figures["overall"]["tokens"]) == (3, 4)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_predictions_that_are_not_finite_have_no_perplexity(model, words, value):
    class Broken:
        def logits(self, requests):
            for index, request in enumerate(requests):
                logits = torch.zeros(len(request.ids), 1 << 16)
                logits[:, 0] = value
                yield index, logits

    with pytest.raises(VerificationError, match="the predictions of the model are not finite numbers"):
        measure_text(windows(model, words), Broken(), None, advance=nothing)
