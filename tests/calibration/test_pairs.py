"""Pairs of source and target, and text with spans cut out, as sequences for an encoder and a decoder."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from calibration_text import plan, refusal, save, text, write_rows, write_texts, write_tokenizer
from sided_text import (
    END,
    FIRST_SENTINEL,
    load_sides,
    plan_sides,
    refused_sides,
    words,
    write_nllb_tokenizer,
    write_t5_tokenizer,
)
from transformers import AutoTokenizer

from hcsmoe_hub.calibration.denoising import corruption_to
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.events import Warned

pytestmark = pytest.mark.usefixtures("no_network", "short_wait")


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_t5_tokenizer(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def nllb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nllb_tokenizer(tmp_path_factory.mktemp("nllb"))


def pair(start: int, source: int, target: int) -> dict[str, str]:
    return {"source": text(start, source), "target": text(start + 200, target)}


def pairs(count: int, source: int = 5, target: int = 3) -> list[dict[str, str]]:
    return [pair(3 * number, source, target) for number in range(count)]


# Pairs


def test_pairs_are_put_one_after_another_and_cut_on_both_sides(t5, tmp_path):
    # 5 words and the end of the source, 3 and the end of the target: sources have 6 tokens of 10.
    found = load_sides(t5, write_rows(tmp_path / "a.jsonl", [pair(0, 5, 3)] * 8), sequence_length=15)
    assert found.source_length == 9
    source = [*words(0, 5), END] * 2
    target = [*words(200, 3), END] * 2
    assert found.token_ids.tolist() == [source[:9] + target[:6]] * 2


def test_sequences_have_the_share_of_sources_that_the_pairs_have(t5, tmp_path):
    rows = write_rows(tmp_path / "a.jsonl", pairs(60, source=11, target=3))
    found = load_sides(t5, rows, sequence_length=40, samples=6)
    assert (found.source_length, found.token_ids.shape) == (30, (6, 40))


def test_a_source_length_that_is_asked_for_is_kept(t5, tmp_path):
    found = load_sides(t5, write_rows(tmp_path / "a.jsonl", pairs(30)), sequence_length=20, source_length=7)
    assert found.source_length == 7
    assert found.token_ids.shape == (2, 20)


def test_what_does_not_fill_both_sides_is_left_out(t5, tmp_path):
    found = load_sides(t5, write_rows(tmp_path / "a.jsonl", pairs(7)), sequence_length=20, samples=9)
    # Two pairs fill one sequence.
    assert len(found.token_ids) == 3


def test_too_few_pairs_are_refused_with_what_a_sequence_takes(t5, tmp_path):
    error = refused_sides(t5, write_rows(tmp_path / "a.jsonl", [pair(0, 5, 3)]), sequence_length=30)
    assert "gives 10 tokens, fewer than one sequence of 18 of the source and 12 of the target" in error.message


def test_pairs_keep_their_domains_apart(t5, tmp_path):
    rows = [{**pair(number % 2 * 100, 5, 3), "domain": "ab"[number % 2]} for number in range(60)]
    found = load_sides(t5, write_rows(tmp_path / "a.jsonl", rows), sequence_length=20, samples=8)
    assert set(found.domains) == {"a", "b"}
    for domain, row in zip(found.domains, found.token_ids.tolist(), strict=True):
        start = {"a": 0, "b": 100}[domain]
        assert row == [*words(start, 5), END] * 2 + [*words(start + 200, 3), END] * 2


def test_held_out_pairs_are_others(t5, tmp_path):
    rows = write_rows(tmp_path / "a.jsonl", [pair(number, 5, 3) for number in range(80)])
    found = load_sides(t5, rows, sequence_length=20, samples=8)
    seen = {tuple(row[:5]) for row in found.token_ids.tolist()}
    assert len(found.measured_ids)
    assert not seen & {tuple(row[:5]) for row in found.measured_ids.tolist()}


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"inputs": "w1 w2", "targets": "w3 w4 w5"}, None),
        ({"src": "w1 w2", "tgt": "w3 w4 w5"}, None),
        ({"input_text": "w1 w2", "target_text": "w3 w4 w5"}, None),
        ({"translation": {"en": "w1 w2", "de": "w3 w4 w5"}}, None),
        ({"translation": {"de": "w3 w4 w5", "en": "w1 w2"}}, "translation.en,translation.de"),
        ({"question": "w1 w2", "answer": "w3 w4 w5"}, "question, answer"),
        ({"text": "w9", "source": "w1 w2", "target": "w3 w4 w5"}, None),
    ],
)
def test_both_columns_are_found_or_named(t5, tmp_path, row, column):
    rows = write_rows(tmp_path / "a.jsonl", [row] * 4)
    found = load_sides(t5, rows, sequence_length=7, text_column=column)
    assert found.token_ids.tolist() == [[*words(1, 2), END, *words(3, 3), END]] * 2


def test_pairs_are_read_from_parquet(t5, tmp_path):
    datasets.Dataset.from_list(pairs(20)).to_parquet(tmp_path / "a.parquet")
    assert load_sides(t5, tmp_path / "a.parquet", sequence_length=20).token_ids.shape == (2, 20)


# Languages


def test_languages_of_the_rows_are_marked_as_the_tokenizer_does(nllb, tmp_path):
    row = {"source": "ab", "target": "cd", "source_lang": "fra_Latn", "target_lang": "deu_Latn"}
    found = load_sides(nllb, write_rows(tmp_path / "a.jsonl", [row] * 4), sequence_length=10)
    tokens = ["fra_Latn", "▁", "a", "b", "</s>", "deu_Latn", "▁", "c", "d", "</s>"]
    tokenizer = loaded(nllb)
    assert found.token_ids.tolist() == [tokenizer.convert_tokens_to_ids(tokens)] * 2


def loaded(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_languages_of_the_tokenizer_are_those_of_rows_that_name_none(tmp_path):
    folder = write_nllb_tokenizer(tmp_path / "tokenizer", src_lang="deu_Latn", tgt_lang="fra_Latn")
    other = {"source": "ab", "target": "cd", "source_lang": "eng_Latn", "target_lang": "deu_Latn"}
    rows = [other, {"source": "ab", "target": "cd"}]
    found = load_sides(folder, write_rows(tmp_path / "a.jsonl", rows), sequence_length=10)
    tokenizer = loaded(folder)
    languages = {tuple(tokenizer.convert_ids_to_tokens([row[0], row[5]])) for row in found.token_ids.tolist()}
    assert languages == {("eng_Latn", "deu_Latn"), ("deu_Latn", "fra_Latn")}


def test_a_target_language_that_nobody_names_is_refused(nllb, tmp_path):
    error = refused_sides(nllb, write_rows(tmp_path / "a.jsonl", [{"source": "ab", "target": "cd"}]))
    assert "row 1 does not name its target language, and nor does the tokenizer" in error.message
    assert "add a column target_lang" in error.message


def test_a_language_that_the_tokenizer_does_not_know_is_refused(nllb, tmp_path):
    rows = [{"translation": {"en": "ab", "de": "cd"}}]
    error = refused_sides(nllb, write_rows(tmp_path / "a.jsonl", rows))
    assert "the tokenizer does not know the source language 'en' of row 1" in error.message


# Text


def test_text_alone_is_corrupted_as_t5_was_pretrained(t5, tmp_path):
    rows = write_texts(tmp_path / "a.jsonl", [text(number, 60) for number in range(20)])
    found = load_sides(t5, rows, sequence_length=62, samples=3)
    corruption = corruption_to(62)
    assert found.source_length == corruption.source_length
    for row in found.token_ids.tolist():
        source, target = row[: found.source_length], row[found.source_length :]
        assert source[-1] == target[-1] == END
        assert (source.count(END), target.count(END)) == (1, 1)
        assert target[0] == FIRST_SENTINEL
        assert sum(token in source for token in range(FIRST_SENTINEL - 99, FIRST_SENTINEL + 1)) == corruption.spans


def test_the_same_seed_gives_the_same_corrupted_text(t5, tmp_path):
    rows = write_texts(tmp_path / "a.jsonl", [text(number, 60) for number in range(20)])
    first, again, other = (load_sides(t5, rows, sequence_length=62, seed=seed).token_ids for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_bundled_text_works_by_denoising(t5):
    found = load_sides(t5, "bundled", sequence_length=626, samples=4)
    assert (found.source_length, found.token_ids.shape) == (512, (4, 626))
    assert len(found.measured_ids)


def test_text_is_refused_where_the_tokenizer_has_no_sentinels(nllb, tmp_path):
    error = refused_sides(nllb, write_texts(tmp_path / "a.jsonl", ["ab cd ef gh"] * 9))
    assert "has no sentinels" in error.message
    assert '"source"' in str(error.hint)


def test_more_spans_than_sentinels_are_refused(tmp_path):
    folder = write_t5_tokenizer(tmp_path / "t5", sentinels=2)
    rows = write_texts(tmp_path / "a.jsonl", [text(number, 60) for number in range(20)])
    error = refused_sides(folder, rows, sequence_length=200)
    assert "too many for 2 sentinels" in error.message
    assert "smaller" in str(error.hint)


def test_a_source_length_is_refused_for_text(t5, tmp_path):
    rows = write_texts(tmp_path / "a.jsonl", [text(number, 60) for number in range(20)])
    assert "`source_length` has no use" in refused_sides(t5, rows, source_length=5).message


# What cannot be used


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"source": "w1", "target": None}, "row 3 has no target"),
        ({"source": None, "target": "w1"}, "row 3 has no source"),
        ({"source": "w1", "target": "  "}, "the target of row 3 is empty"),
        ({"source": "w1", "target": 5}, "the target of row 3 is 5, which is not text"),
        ({"source": ["w1"], "target": "w2"}, "the source of row 3 is ['w1'], which is not text"),
        ({"source": "w1"}, "row 3 has no target"),
    ],
)
def test_a_row_without_both_sides_is_left_out_and_named(t5, tmp_path, row, reason):
    rows = write_rows(tmp_path / "a.jsonl", [pair(0, 5, 3), pair(0, 5, 3), row, pair(0, 5, 3), pair(0, 5, 3)])
    events = []
    found = load_sides(t5, rows, sequence_length=20, samples=9, emit=events.append)
    assert len(found.token_ids) == 2
    message = next(event.message for event in events if isinstance(event, Warned))
    assert message == f"rows of a.jsonl left out: 1 of 5: 1 without a usable pair of source and target ({reason})."


def test_rows_that_are_all_without_a_target_are_refused(t5, tmp_path):
    rows = write_rows(tmp_path / "a.jsonl", [{"source": "w1", "target": ""}] * 3)
    message = refused_sides(t5, rows).message
    assert message.startswith(f"most rows of {rows} give nothing to calibrate on, 3 of 3: 3 without a usable pair")


def test_columns_that_are_named_must_exist(t5, tmp_path):
    error = refused_sides(t5, write_rows(tmp_path / "a.jsonl", pairs(3)), text_column="source,translation.de")
    assert "has no column 'translation.de': its columns are source, target." in error.message


def test_rows_without_pairs_and_text_are_refused_with_their_columns(t5, tmp_path):
    error = refused_sides(t5, write_rows(tmp_path / "a.jsonl", [{"source": "w1", "label": "w2"}] * 3))
    assert "has no text: its columns are source, label." in error.message


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "w1"}]},
        {"prompt": "w1", "response": "w2"},
    ],
    ids=["messages", "prompt and response"],
)
def test_chat_messages_are_refused_with_the_way_to_name_a_pair(t5, tmp_path, row):
    error = refused_sides(t5, write_rows(tmp_path / "a.jsonl", [row] * 5))
    assert "have no chat template" in error.message
    assert "text_column='question,answer'" in str(error.hint)


@pytest.mark.parametrize("dataset", ["self", "http://localhost:1/v1"])
def test_text_that_a_model_writes_is_refused_before_anything_is_read(dataset):
    error = refusal(lambda: plan_sides(dataset), PlanError)
    assert "text that a model writes without a source" in error.message


def test_pairs_and_text_are_not_mixed(t5, tmp_path):
    a, b = write_rows(tmp_path / "a.jsonl", pairs(30)), write_texts(tmp_path / "b.jsonl", [text(0, 50)] * 9)
    error = refused_sides(t5, f"{a},{b}")
    assert f"{a} holds pairs of source and target, but {b} holds text" in error.message


def test_text_among_pairs_is_left_out_and_counted(t5, tmp_path):
    rows = write_rows(tmp_path / "a.jsonl", [*pairs(8), {"text": "w1"}, *pairs(8)])
    events = []
    load_sides(t5, rows, sequence_length=20, samples=9, emit=events.append)
    assert any("a row holds text among pairs" in event.message for event in events if isinstance(event, Warned))


# Token ids


def test_token_ids_are_split_in_half_or_as_asked(t5, tmp_path):
    file = save(tmp_path / "ids.npy", np.ones((2, 9), np.int64))
    assert load_sides(t5, file).source_length == 4
    assert load_sides(t5, file, source_length=6).source_length == 6
    error = refusal(lambda: plan_sides(file, source_length=9), PlanError)
    assert "need at least one each" in error.message


# Plans


def test_sequences_have_the_length_of_t5s_pretraining_by_default():
    found = plan_sides("bundled", sequence_length=None, samples=None)
    assert (found.sequence_length, found.source_length, found.sequences) == (626, 512, 104)
    assert plan_sides("bundled", sequence_length=None, max_positions=100).sequence_length == 100


def test_sequences_longer_than_the_positions_are_refused():
    error = refusal(lambda: plan_sides("bundled", sequence_length=120, max_positions=100), PlanError)
    assert "sequences of 120 tokens are longer than the 100 positions" in error.message


def test_a_decoder_alone_takes_no_source_length(tmp_path):
    error = refusal(lambda: plan("bundled", source_length=3), PlanError)
    assert "has a decoder alone" in error.message


def test_ids_outside_the_vocabulary_are_refused(t5, tmp_path):
    rows = write_rows(tmp_path / "a.jsonl", pairs(30))
    assert "vocabulary of 150 tokens" in refused_sides(t5, rows, vocab_size=150).message


def test_a_tokenizer_of_words_alone_takes_pairs(tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer", eos_token="</s>")
    found = load_sides(folder, write_rows(tmp_path / "a.jsonl", pairs(30)), sequence_length=16)
    assert found.source_length == 10
