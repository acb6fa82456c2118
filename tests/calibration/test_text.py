"""Calibration text to tokens: packing, every kind of file, and a clear refusal of everything else."""

import csv
import gzip
import hashlib
import json
import pickle
import socket
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hcsmoe_hub.calibration.text import CalibrationPlan, fingerprint, load_token_ids, plan_calibration
from hcsmoe_hub.errors import CalibrationError, HcsmoeError, PlanError
from hcsmoe_hub.options import CalibrationOptions

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-mixtral"
EOS, UNKNOWN, USER, ASSISTANT, FIRST = 0, 1, 2, 3, 4
WORDS = 400
VOCABULARY = FIRST + WORDS
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a connection fails the test."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"a connection was opened: {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a Parquet file, datasets waits five seconds for threads that have long ended."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


# A tokenizer whose ids can be read: word w7 is id FIRST + 7


def write_tokenizer(folder: Path, **settings: Any) -> Path:
    vocabulary = {"</s>": EOS, "[UNK]": UNKNOWN, "user": USER, "assistant": ASSISTANT}
    vocabulary |= {f"w{number}": FIRST + number for number in range(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One id per word, an end of sequence, no chat template."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), eos_token="</s>")


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template: role and content of every message."""
    folder = tmp_path_factory.mktemp("chat")
    return write_tokenizer(folder, eos_token="</s>", chat_template=CHAT_TEMPLATE)


def ids(start: int, count: int) -> list[int]:
    """Ids of ``count`` words from word ``start``."""
    return list(range(FIRST + start, FIRST + start + count))


def text(start: int, count: int) -> str:
    """The words of ``ids``."""
    return " ".join(f"w{number}" for number in range(start, start + count))


def plan(dataset: Path | str, *, max_positions: int | None = 64, **options: Any) -> CalibrationPlan:
    chosen = CalibrationOptions(dataset=str(dataset), **({"samples": 2, "sequence_length": 4} | options))
    return plan_calibration(chosen, max_positions=max_positions, has_tokenizer=True, label="org/model")


Load = Callable[..., Tensor]


@pytest.fixture
def load(tokenizer: Path) -> Load:
    """Plans and loads with the plain tokenizer."""

    def run(dataset: Path | str, **options: Any) -> Tensor:
        return load_token_ids(plan(dataset, **options), tokenizer_folder=tokenizer, vocab_size=VOCABULARY)

    return run


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_texts(path: Path, texts: Sequence[str]) -> Path:
    return write_rows(path, [{"text": one} for one in texts])


def refusal(action: Callable[[], Any], kind: type[HcsmoeError] = CalibrationError) -> HcsmoeError:
    with pytest.raises(kind) as caught:
        action()
    assert caught.value.hint, "a refusal says what to do"
    return caught.value


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


def test_there_are_never_more_sequences_than_asked_for(load: Load, tmp_path: Path) -> None:
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


# Kinds of files


def write_json(path: Path, documents: Sequence[str]) -> None:
    path.write_text(json.dumps([{"text": document} for document in documents]))


def write_txt(path: Path, documents: Sequence[str]) -> None:
    path.write_text("\n\n".join(documents))


def write_parquet(path: Path, documents: Sequence[str]) -> None:
    pq.write_table(pa.table({"text": list(documents)}), path)


def write_csv(path: Path, documents: Sequence[str]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "n"], *([document, number] for number, document in enumerate(documents))])


def write_gzip(path: Path, documents: Sequence[str]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps({"text": one}) + "\n" for one in documents).encode()))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_texts),
        ("a.json", write_json),
        ("a.txt", write_txt),
        ("a.parquet", write_parquet),
        ("a.csv", write_csv),
        ("a.jsonl.gz", write_gzip),
    ],
)
def test_every_kind_of_file_gives_the_same_documents(
    load: Load, tmp_path: Path, name: str, write: Callable[[Path, Sequence[str]], Any]
) -> None:
    write(tmp_path / name, [text(start, 7) for start in (0, 50, 100)])
    sequences = load(tmp_path / name, samples=3, sequence_length=8)
    assert sorted(sequences.tolist()) == [[*ids(start, 7), EOS] for start in (0, 50, 100)]


def test_paragraphs_of_a_text_file_are_documents_and_its_lines_are_not(load: Load, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"{text(0, 2)}\n{text(2, 2)}\n\n{text(10, 4)}\n")
    sequences = load(tmp_path / "a.txt", sequence_length=5)
    assert sorted(sequences.tolist()) == [[*ids(0, 4), EOS], [*ids(10, 4), EOS]]


def test_a_file_is_found_in_the_home_folder(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_texts(tmp_path / "a.jsonl", [text(0, 4)])
    np.save(tmp_path / "a.npy", np.array([ids(0, 4)]))
    assert load("~/a.jsonl").tolist() == load("~/a.npy").tolist() == [ids(0, 4)]


def test_the_bundled_text_fills_the_default_set_of_a_real_tokenizer() -> None:
    chosen = plan_calibration(CalibrationOptions(), max_positions=None, has_tokenizer=True, label="example")
    vocabulary = json.loads((EXAMPLE / "config.json").read_text())["vocab_size"]
    assert load_token_ids(chosen, tokenizer_folder=EXAMPLE, vocab_size=vocabulary).shape == (32, 2048)


@pytest.mark.parametrize(
    "name",
    ["part[1].jsonl", "part*.jsonl", "white space.jsonl", "a#b.jsonl", "a{b}.jsonl", "é.jsonl"],
)
def test_a_file_of_any_name_is_read_and_no_other(load: Load, tmp_path: Path, name: str) -> None:
    write_texts(tmp_path / "part1.jsonl", [text(100, 3)])
    write_texts(tmp_path / name, [text(0, 3)])
    assert load(tmp_path / name, samples=9).tolist() == [[*ids(0, 3), EOS]]


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
    assert "--text-column" in error.hint


def test_a_file_without_text_is_refused_with_the_names_of_its_columns(load: Load, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("title,author\nw1,w2\n")
    error = refusal(lambda: load(tmp_path / "a.csv"))
    assert "title, author" in error.message
    assert "--text-column" in error.hint


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
    assert "--text-column" in error.hint


def test_plain_text_beside_messages_needs_no_chat_template(load: Load, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"messages": chat(text(50, 9)), "text": text(0, 4)}])
    assert load(file, text_column="text").tolist() == [ids(0, 4)]


def test_messages_that_the_chat_template_refuses_are_refused(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    folder = write_tokenizer(tmp_path / "tokenizer", eos_token="</s>", chat_template=template)
    file = write_rows(tmp_path / "a.jsonl", [{"messages": chat(text(0, 9))}])
    error = refusal(lambda: load_token_ids(plan(file), tokenizer_folder=folder, vocab_size=VOCABULARY))
    assert "roles must alternate" in error.message


# Too little, too much, damaged


def test_too_little_text_for_one_sequence_is_refused_with_both_counts(load: Load, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "a.jsonl", [text(0, 5)])
    error = refusal(lambda: load(file, sequence_length=7))
    assert "6 tokens" in error.message
    assert "one sequence of 7" in error.message
    assert "--sequence-length" in error.hint


def test_too_little_text_for_all_sequences_gives_fewer(load: Load, tmp_path: Path) -> None:
    assert load(write_texts(tmp_path / "a.jsonl", [text(0, 9)]), samples=50).shape == (2, 4)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv", "a.parquet"])
def test_an_empty_file_is_refused(load: Load, tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert str(tmp_path / name) in refusal(lambda: load(tmp_path / name)).message


COMPRESSED = gzip.compress(json.dumps({"text": text(0, WORDS)}).encode())
DAMAGED = {
    "cut.jsonl": b'{"text": "w1 w2',
    "words.jsonl": b"w1 w2 w3 w4 w5",
    "latin.txt": "w1 w2 caf\xe9 w3".encode("latin-1"),
    "latin.jsonl": b'{"text": "caf\xe9"}',
    "a.parquet": b"PAR1 w1 w2 w3 w4",
    "plain.jsonl.gz": b'{"text": "w1 w2 w3 w4"}',
    "cut.jsonl.gz": COMPRESSED[:40],
    "broken.jsonl.gz": COMPRESSED[:12] + b"\xff" * 40,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused(load: Load, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(DAMAGED[name])
    assert f"{tmp_path / name} cannot be read: " in refusal(lambda: load(tmp_path / name)).message


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


# Token ids


def save(path: Path, array: Any) -> Path:
    np.save(path, np.asarray(array), allow_pickle=True)
    return path


@pytest.mark.parametrize("order", ["C", "F"])
def test_token_ids_are_used_as_they_are(load: Load, tmp_path: Path, order: Any) -> None:
    array = np.random.default_rng(0).integers(0, VOCABULARY, (5, 7))
    file = save(tmp_path / "ids.npy", np.array(array, order=order))
    # Samples, length and seed are those of the file.
    found = load(file, samples=2, sequence_length=3, seed=9)
    assert found.tolist() == array.tolist()
    assert found.dtype == torch.int64


def test_the_plan_of_token_ids_has_the_size_of_the_file(tmp_path: Path) -> None:
    found = plan(save(tmp_path / "ids.npy", np.zeros((5, 7), dtype=np.int64)))
    assert (found.sequences, found.sequence_length, found.tokens, found.is_token_ids) == (5, 7, 35, True)


def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    options = CalibrationOptions(dataset=str(save(tmp_path / "ids.npy", [[5, 6, 7]])))
    chosen = plan_calibration(options, max_positions=None, has_tokenizer=False, label="org/model")
    assert load_token_ids(chosen, tokenizer_folder=tmp_path, vocab_size=8).tolist() == [[5, 6, 7]]


@pytest.mark.parametrize("dtype", ["int32", "uint64", "float64", ">i8", "bool", "U3"])
def test_token_ids_of_another_dtype_are_refused(tmp_path: Path, dtype: str) -> None:
    file = save(tmp_path / "ids.npy", np.ones((2, 3), dtype=dtype))
    error = refusal(lambda: plan(file))
    assert f"holds {np.dtype(dtype)} values of shape [2, 3]" in error.message
    assert "int64" in error.hint


@pytest.mark.parametrize("shape", [(6,), (1, 2, 3), (0, 4), (4, 0), ()])
def test_token_ids_of_another_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    file = save(tmp_path / "ids.npy", np.zeros(shape, dtype=np.int64))
    error = refusal(lambda: plan(file))
    assert str(file) in error.message
    assert "[sequences, length]" in error.hint


class Trap:
    """A pickle that leaves a trace when it is opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.trace,)


def test_pickled_objects_are_refused_and_never_opened(tmp_path: Path) -> None:
    trace = tmp_path / "opened"
    array = np.empty((1, 1), dtype=object)
    array[0, 0] = Trap(trace)
    objects, plain = save(tmp_path / "objects.npy", array), tmp_path / "plain.npy"
    plain.write_bytes(pickle.dumps(Trap(trace)))
    for file in (objects, plain):
        assert "is no array of numbers" in refusal(lambda file=file: plan(file)).message
    assert not trace.exists()
    np.load(objects, allow_pickle=True)
    assert trace.exists(), "the trap itself must work"


@pytest.mark.parametrize("cut", [0, 5, 60, 140])
def test_a_file_of_token_ids_that_ends_early_is_refused(tmp_path: Path, cut: int) -> None:
    file = save(tmp_path / "ids.npy", np.zeros((4, 4), dtype=np.int64))
    file.write_bytes(file.read_bytes()[:cut])
    assert "is no array of numbers" in refusal(lambda: plan(file)).message


@pytest.mark.parametrize("damage", ["archive", "no archive", "header"])
def test_a_file_of_another_format_that_calls_itself_token_ids_is_refused(tmp_path: Path, damage: str) -> None:
    file = save(tmp_path / "ids.npy", np.zeros((4, 4), dtype=np.int64))
    match damage:
        case "archive":
            with file.open("wb") as target:
                np.savez(target, ids=np.zeros((4, 4), dtype=np.int64))
        case "no archive":
            file.write_bytes(b"PK\x03\x04 and nothing more")
        case "header":
            file.write_bytes(file.read_bytes().replace(b"{'descr'", b"(" * 8))
    assert str(file) in refusal(lambda: plan(file)).message


@pytest.mark.parametrize(("lowest", "highest"), [(-1, 5), (0, VOCABULARY)])
def test_token_ids_outside_the_vocabulary_are_refused(load: Load, tmp_path: Path, lowest: int, highest: int) -> None:
    file = save(tmp_path / "ids.npy", [[lowest, 3, highest]])
    error = refusal(lambda: load(file))
    assert f"from {lowest} to {highest}" in error.message
    assert f"ends at {VOCABULARY - 1}" in error.message


def test_the_last_id_of_the_vocabulary_is_taken(load: Load, tmp_path: Path) -> None:
    assert load(save(tmp_path / "ids.npy", [[0, VOCABULARY - 1]])).tolist() == [[0, VOCABULARY - 1]]


def test_a_missing_file_of_token_ids_is_refused(tmp_path: Path) -> None:
    assert f"there is no calibration file {tmp_path / 'ids.npy'}" in refusal(lambda: plan(tmp_path / "ids.npy")).message


# Plans


@pytest.mark.parametrize(("max_positions", "length"), [(64, 64), (2048, 2048), (131072, 2048), (None, 2048)])
def test_the_default_length_is_2048_or_what_the_model_takes(max_positions: int | None, length: int) -> None:
    assert plan("bundled", sequence_length=None, max_positions=max_positions).sequence_length == length


def test_a_length_of_all_positions_is_taken_and_one_more_is_refused() -> None:
    assert plan("bundled", sequence_length=64).tokens == 128
    error = refusal(lambda: plan("bundled", sequence_length=65), PlanError)
    assert "65 tokens" in error.message
    assert "64 positions of org/model" in error.message
    assert "--sequence-length 64" in error.hint


def test_any_length_is_taken_when_the_model_names_no_limit() -> None:
    assert plan("bundled", sequence_length=100_000, max_positions=None).sequence_length == 100_000


def test_token_ids_longer_than_the_positions_are_refused(tmp_path: Path) -> None:
    file = save(tmp_path / "ids.npy", np.zeros((1, 65), dtype=np.int64))
    assert "65 tokens are longer than the 64 positions" in refusal(lambda: plan(file), PlanError).message


def test_token_ids_that_are_too_long_are_not_blamed_on_an_option(tmp_path: Path) -> None:
    file = save(tmp_path / "ids.npy", np.zeros((1, 65), dtype=np.int64))
    assert "--sequence-length" not in refusal(lambda: plan(file), PlanError).hint


@pytest.mark.parametrize("dataset", ["bundled", "c4", "org/name"])
def test_text_without_a_tokenizer_is_refused_with_the_way_out(dataset: str) -> None:
    options = CalibrationOptions(dataset=dataset)
    error = refusal(
        lambda: plan_calibration(options, max_positions=64, has_tokenizer=False, label="org/model"), PlanError
    )
    assert "org/model has no tokenizer" in error.message
    assert ".npy" in error.hint


@pytest.mark.parametrize("dataset", ["bundled", "c4", "org/name"])
def test_a_plan_looks_nothing_up(dataset: str) -> None:
    found = plan(dataset, seed=3, text_column="body")
    assert (found.dataset, found.seed, found.text_column, found.is_token_ids) == (dataset, 3, "body", False)


@pytest.mark.parametrize(
    "dataset",
    [
        "missing.jsonl",
        "folder/missing.txt",
        "missing",
        "./folder/missing",
        "~/missing",
        "/a/b/c",
        "a/b/c",
        "/missing",
    ],
)
def test_a_missing_file_is_refused_and_not_taken_for_a_repository(dataset: str) -> None:
    assert f"there is no calibration file {dataset}" in refusal(lambda: plan(dataset)).message


@pytest.mark.parametrize("name", ["a.docx", "a.npz", "a.jsonl.zst", "a"])
def test_a_file_of_no_known_kind_is_refused_with_the_kinds_that_are(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("w1 w2 w3 w4")
    error = refusal(lambda: plan(tmp_path / name))
    assert f"{tmp_path / name} is of no known kind" in error.message
    assert all(ending in error.hint for ending in (".jsonl", ".json", ".txt", ".parquet", ".csv", ".npy"))


# The fingerprint


def test_the_fingerprint_is_the_hash_of_little_endian_int64_row_by_row() -> None:
    token_ids = torch.tensor([[0, 1, 2], [3, 4, 2**40]])
    expected = hashlib.sha256(struct.pack("<6q", 0, 1, 2, 3, 4, 2**40)).hexdigest()
    assert fingerprint(token_ids) == expected
    # A stored value, so that reports of different versions can be compared.
    assert expected == "0ece52069cc0b0aedfd12072074c4f17cda0bd82af1b32923698edafd7f40bfb"


def test_the_fingerprint_follows_the_order_of_the_ids_and_not_of_the_memory() -> None:
    token_ids = torch.arange(6).view(2, 3)
    assert fingerprint(token_ids.T) == fingerprint(token_ids.T.contiguous())
    assert fingerprint(token_ids.T) != fingerprint(token_ids)
