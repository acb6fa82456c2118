"""Span corruption: the numbers of T5's pretraining, and a text that input and target give back together."""

from itertools import pairwise

import pytest

from hcsmoe_hub.calibration.denoising import Corruption, corrupt, corruption_of, corruption_to

END, SENTINELS = 1, list(range(999, 899, -1))


def restored(source: list[int], target: list[int]) -> list[int]:
    """The text that a target fills into the gaps of a source."""
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    return [token for place in source[:-1] for token in spans.get(place, [place])]


def cut(corruption: Corruption, seed: int = 0) -> tuple[list[int], list[int], list[int]]:
    text = [100 + number % 700 for number in range(corruption.tokens)]
    return (text, *corrupt(text, corruption, sentinels=SENTINELS, end=END, seed=seed))


def test_a_sequence_of_626_tokens_has_the_numbers_of_t5s_pretraining():
    found = corruption_to(626)
    assert found == Corruption(tokens=568, noise=85, spans=28)
    assert (found.source_length, found.target_length) == (512, 114)


@pytest.mark.parametrize(("tokens", "noise", "spans"), [(2, 1, 1), (10, 2, 1), (100, 15, 5), (182, 27, 9)])
def test_fifteen_percent_are_noise_in_spans_of_three(tokens, noise, spans):
    assert corruption_of(tokens) == Corruption(tokens=tokens, noise=noise, spans=spans)


@pytest.mark.parametrize("length", range(6, 160))
def test_source_and_target_fill_every_length_without_padding(length):
    found = corruption_to(length)
    text, source, target = cut(found)
    assert (len(source), len(target)) == (found.source_length, found.target_length)
    assert len(source) + len(target) == length
    assert restored(source, target) == text
    assert source[-1] == target[-1] == END
    assert abs(found.spans - corruption_of(found.tokens).spans) <= 1


def test_sentinels_count_in_order_and_each_stands_for_one_span():
    corruption = corruption_to(300)
    _, source, target = cut(corruption)
    wanted = SENTINELS[: corruption.spans]
    assert [token for token in source if token in SENTINELS] == wanted
    assert [token for token in target if token in SENTINELS] == wanted


def test_no_text_is_short_enough_for_five_tokens():
    assert corruption_to(5) is None


def test_the_same_seed_cuts_the_same_spans_and_another_one_others():
    corruption = corruption_to(200)
    assert cut(corruption, seed=3) == cut(corruption, seed=3)
    assert len({tuple(cut(corruption, seed=seed)[1]) for seed in range(5)}) == 5


def test_spans_have_three_tokens_on_average():
    lengths = []
    for seed in range(20):
        _, _, target = cut(corruption_to(626), seed=seed)
        places = [place for place, token in enumerate(target) if token in SENTINELS or token == END]
        lengths += [after - before - 1 for before, after in pairwise(places)]
    assert min(lengths) >= 1
    assert sum(lengths) / len(lengths) == pytest.approx(85 / 28)
