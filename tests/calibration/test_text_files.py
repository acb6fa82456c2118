"""Files of calibration text: every kind gives the same documents, whatever its name; damaged ones are refused."""

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from calibration_text import EOS, WORDS, Load, ids, refusal, text, write_texts
from places import EXAMPLE

from hcsmoe_hub.calibration.text import load_token_ids, plan_calibration
from hcsmoe_hub.options import CalibrationOptions

pytestmark = pytest.mark.usefixtures("no_network", "short_wait")


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
    chosen = plan_calibration(CalibrationOptions(), max_positions=None, has_tokenizer=True, label="example", fits=False)
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


# Empty and damaged files


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
