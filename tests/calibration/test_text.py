"""Calibration text to tokens: packing, columns and chats, and a clear refusal of text without tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_text import (
    ASSISTANT,
    EOS,
    FIRST,
    USER,
    VOCABULARY,
    Load,
    ids,
    load_token_ids,
    plan,
    refusal,
    text,
    write_rows,
    write_texts,
    write_tokenizer,
)

pytestmark = pytest.mark.usefixtures("no_network", "short_wait")


# Packing


def test_documents_are_joined_and_cut_into_sequences_of_equal_length(load: Load, tmp_path: Path) -> None:
    sequences = load(write_texts(tmp_path / "a.jsonl", [text(0, 11)]), samples=3)
    # 11 words and the end of the document.
    assert sequences.tolist() == [ids(0, 4), ids(4, 4), [*ids(8, 3), EOS]]
    assert sequences.dtype == torch.int64


def test_every_document_ends_with_the_end_of_sequence_token_and_nothing_is_padded(load: Load, tmp_path: Path) -> None:
    lengths = [1, 5, 2, 9, 3, 4, 7]
    starts = [20 * number for number in range(len(lengths))]
    documents = [ids(start, length) for start, length in zip(starts, lengths, strict=True)]
    file = write_texts(tmp_path / "a.jsonl", [text(one[0] - FIRST, len(one)) for one in documents])
    total = sum(lengths) + len(lengths)
    stream = load(file, samples=total, sequence_length=1).flatten().tolist()
    assert len(stream) == total
    found, current = [], []
    for token in stream:
        if token == EOS:
            found.append(current)
            current = []
        else:
            current.append(token)
    assert sorted(found) == documents
    assert current == []


def test_what_does_not_fill_a_sequence_is_left_out(load: Load, tmp_path: Path) -> None:
    sequences = load(write_texts(tmp_path / "a.jsonl", [text(0, 10)]), samples=9)
    assert sequences.tolist() == [ids(0, 4), ids(4, 4)]


def test_there_are_never_more_sequences_than_requested(load: Load, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "a.jsonl", [text(0, 50), text(50, 50)])
    assert load(file, samples=3, sequence_length=8).shape == (3, 8)


def test_more_sequences_begin_with_the_same_ones(load: Load, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "a.jsonl", [text(number, 7) for number in range(50)])
    assert torch.equal(load(file, samples=20)[:5], load(file, samples=5))


def test_a_tokenizer_without_an_end_of_sequence_joins_documents_directly(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer")
    file = write_texts(tmp_path / "a.jsonl", [text(0, 3), text(0, 3)])
    sequences = load_token_ids(plan(file, sequence_length=6), tokenizer_folder=folder, vocab_size=VOCABULARY)
    assert sequences.tolist() == [ids(0, 3) * 2]


def test_a_document_longer_than_the_tokenizer_allows_is_not_shortened(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer", eos_token="</s>", model_max_length=8)
    file = write_texts(tmp_path / "a.jsonl", [text(0, 40)])
    sequences = load_token_ids(plan(file, samples=10), tokenizer_folder=folder, vocab_size=VOCABULARY)
    assert sequences.flatten().tolist() == ids(0, 40)


def test_the_same_seed_gives_the_same_tokens(load: Load, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "a.jsonl", [text(number, 7) for number in range(100)])
    assert torch.equal(load(file, samples=20, seed=7), load(file, samples=20, seed=7))


def test_another_seed_gives_other_tokens(load: Load, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "a.jsonl", [text(number, 7) for number in range(100)])
    found = {tuple(load(file, samples=20, seed=seed).flatten().tolist()) for seed in range(4)}
    assert len(found) == 4


def test_blank_documents_add_nothing_not_even_an_end(load: Load, tmp_path: Path) -> None:
    rows = [{"text": text(0, 3)}, {"text": ""}, {"text": text(0, 3)}, {"text": None}]
    sequences = load(write_rows(tmp_path / "a.jsonl", rows), samples=8, text_column="text")
    assert sequences.tolist() == [[*ids(0, 3), EOS]] * 2


@pytest.mark.parametrize(
    "blank", [{"text": ""}, {"text": None}, {"content": None}, {"other": "w9"}], ids=["empty", "null", "none", "other"]
)
def test_blank_rows_do_not_hide_the_text_of_the_others(load: Load, tmp_path: Path, blank: dict[str, Any]) -> None:
    file = write_rows(tmp_path / "a.jsonl", [blank, {"text": text(0, 3)}, blank])
    for seed in range(6):
        assert load(file, seed=seed).tolist() == [[*ids(0, 3), EOS]]


# Columns


@pytest.mark.parametrize("column", ["text", "content"])
def test_the_text_is_found_in_its_usual_columns(load: Load, tmp_path: Path, column: str) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"id": "w300 w301 w302 w303", column: text(0, 4)}])
    assert load(file).tolist() == [ids(0, 4)]


def test_a_column_is_taken_by_name(load: Load, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"text": text(100, 4), "body": text(0, 4)}])
    assert load(file, text_column="body").tolist() == [ids(0, 4)]


def test_an_unknown_column_is_refused_with_the_names_of_the_others(load: Load, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"title": "w1", "text": text(0, 4)}])
    error = refusal(lambda: load(file, text_column="body"))
    assert all(part in error.message for part in (str(file), "'body'", "title, text"))
    assert "`text_column`" in error.hint


def test_a_file_without_text_is_refused_with_the_names_of_its_columns(load: Load, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("title,author\nw1,w2\n")
    error = refusal(lambda: load(tmp_path / "a.csv"))
    assert "title, author" in error.message
    assert "`text_column`" in error.hint


@pytest.mark.parametrize("value", [7, 1.5, ["w1", "w2"], {"a": "w1"}], ids=["integer", "number", "strings", "object"])
def test_a_column_that_holds_neither_text_nor_messages_is_refused(
    chat_tokenizer: Path, tmp_path: Path, value: Any
) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"label": value}])
    chosen = plan(file, text_column="label")
    error = refusal(lambda: load_token_ids(chosen, tokenizer_folder=chat_tokenizer, vocab_size=VOCABULARY))
    assert "label" in error.message


# Chats


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]


def test_messages_pass_through_the_chat_template(chat_tokenizer: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"messages": chat(text(0, 3), text(50, 4))}])
    sequences = load_token_ids(plan(file, sequence_length=9), tokenizer_folder=chat_tokenizer, vocab_size=VOCABULARY)
    # The template says where a conversation ends, so nothing is added.
    assert sequences.tolist() == [[USER, *ids(0, 3), ASSISTANT, *ids(50, 4)]]


def test_conversations_follow_each_other_directly(chat_tokenizer: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"messages": chat(text(0, 2))}] * 3)
    sequences = load_token_ids(plan(file, sequence_length=9), tokenizer_folder=chat_tokenizer, vocab_size=VOCABULARY)
    assert sequences.tolist() == [[USER, *ids(0, 2)] * 3]


def test_messages_are_preferred_to_text(chat_tokenizer: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"text": text(100, 9), "messages": chat(text(0, 3))}])
    sequences = load_token_ids(plan(file), tokenizer_folder=chat_tokenizer, vocab_size=VOCABULARY)
    assert sequences.tolist() == [[USER, *ids(0, 3)]]


def test_conversations_are_found_in_a_named_column(chat_tokenizer: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"dialogue": chat(text(0, 3))}])
    chosen = plan(file, text_column="dialogue")
    sequences = load_token_ids(chosen, tokenizer_folder=chat_tokenizer, vocab_size=VOCABULARY)
    assert sequences.tolist() == [[USER, *ids(0, 3)]]


def test_messages_are_refused_without_a_chat_template(load: Load, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"messages": chat(text(0, 9))}])
    error = refusal(lambda: load(file))
    assert "chat template" in error.message
    assert "`text_column`" in error.hint


def test_plain_text_next_to_messages_needs_no_chat_template(load: Load, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"messages": chat(text(50, 9)), "text": text(0, 4)}])
    assert load(file, text_column="text").tolist() == [ids(0, 4)]


def test_messages_that_the_chat_template_refuses_are_refused(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    folder = write_tokenizer(tmp_path / "tokenizer", eos_token="</s>", chat_template=template)
    file = write_rows(tmp_path / "a.jsonl", [{"messages": chat(text(0, 9))}])
    error = refusal(lambda: load_token_ids(plan(file), tokenizer_folder=folder, vocab_size=VOCABULARY))
    assert "roles must alternate" in error.message


# Too little text, and a tokenizer that does not fit


def test_too_little_text_for_one_sequence_is_refused_with_both_counts(load: Load, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "a.jsonl", [text(0, 5)])
    error = refusal(lambda: load(file, sequence_length=7))
    assert "6 tokens" in error.message
    assert "one sequence of 7" in error.message
    assert "`sequence_length`" in error.hint


def test_too_little_text_for_all_sequences_gives_fewer(load: Load, tmp_path: Path) -> None:
    assert load(write_texts(tmp_path / "a.jsonl", [text(0, 9)]), samples=50).shape == (2, 4)


def test_words_beyond_the_vocabulary_of_the_model_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "a.jsonl", [text(0, 9)])
    error = refusal(lambda: load_token_ids(plan(file), tokenizer_folder=tokenizer, vocab_size=FIRST + 7))
    assert f"from {FIRST} to {FIRST + 7}" in error.message
    assert f"ends at {FIRST + 6}" in error.message


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer")
    (folder / "tokenizer.json").write_text("{")
    file = write_texts(tmp_path / "a.jsonl", [text(0, 9)])
    error = refusal(lambda: load_token_ids(plan(file), tokenizer_folder=folder, vocab_size=VOCABULARY))
    assert "tokenizer" in error.message
