"""When a continuation counts as a loop."""

import pytest
import torch
from calibration_text import FIRST, refusal

from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.evaluation.loops import (
    CONTINUATION_TOKENS,
    PROMPT_TOKENS,
    choose_prompts,
    is_loop,
    measure_loops,
    repeated_ngrams,
)
from hcsmoe_hub.evaluation.options import DEFAULT_WINDOW
from hcsmoe_hub.evaluation.records import TextRecord, read_texts
from hcsmoe_hub.evaluation.tokens import Tokens


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        ([9, 1, 2, 1, 2, 1, 2], True),
        # A loop may break off within its phrase.
        ([9, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2], True),
        ([1, 2, 9, 1, 2, 1, 2], False),
        ([1, 2, 1, 2, 1, 2, 9], False),
        # A phrase has two tokens or more, so three full stops are not a loop.
        ([4, 5, 7, 7, 7], False),
        ([7, 7, 7, 7, 7, 7], True),
        ([], False),
        ([1], False),
    ],
)
def test_loop_is_a_phrase_that_is_repeated_three_times_at_the_end(ids, wanted):
    assert is_loop(ids) is wanted


@pytest.mark.parametrize("period", [2, 5, 16, 40])
def test_long_phrases_loop_as_well(period):
    phrase = torch.randperm(100, generator=torch.Generator().manual_seed(period))[:period].tolist()
    assert is_loop(phrase * 3)
    assert not is_loop(phrase * 2)


def test_repeated_ngrams_are_those_that_occurred_before():
    assert repeated_ngrams([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 - 4 / 5)
    assert repeated_ngrams([1, 1, 1]) == 0
    assert repeated_ngrams(list(range(20))) == 0


def test_prompts_are_beginnings_of_long_records_evenly_spaced(model):
    tokens = Tokens(LocalSource(model))
    texts = [" ".join(f"w{10 * number + place}" for place in range(40)) for number in range(6)]
    records = [TextRecord(text=text, domain=None) for text in ["w1 w2", *texts]]
    prompts = choose_prompts(records, tokens, count=3)
    assert [ids[1] for _, ids in prompts] == [FIRST + 10 * number for number in (0, 2, 4)]
    assert {len(ids) for _, ids in prompts} == {PROMPT_TOKENS + 1}
    assert {ids[0] for _, ids in prompts} == {tokens.first}
    error = refusal(lambda: choose_prompts(records, tokens, count=7), PlanError)
    assert "6 of 7 records" in error.message


def test_rate_is_counted_per_domain(model, words, loaded):
    tokens = Tokens(LocalSource(model))
    prompts = choose_prompts(read_texts(words)[0], tokens, count=2)
    figures = measure_loops(prompts, loaded, last=tokens.last)
    added = loaded.continuations([ids for _, ids in prompts], tokens=128, last=tokens.last)
    assert figures["overall"]["loop_rate"] == sum(map(is_loop, added)) / 2
    assert figures["overall"]["repeated_4grams"] == pytest.approx(sum(map(repeated_ngrams, added)) / 2)
    assert figures["domains"].keys() == {"prose"}
    assert figures["domains"]["prose"] == figures["overall"]


def test_prompts_continuations_and_windows_are_as_long_as_documented():
    assert (PROMPT_TOKENS, CONTINUATION_TOKENS, DEFAULT_WINDOW) == (32, 128, 256)
