"""Files of calibration text: every kind gives the same documents, whatever its name; damaged ones are refused."""

import bz2
import csv
import gzip
import json
import lzma
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from calibration_text import EOS, WORDS, Load, ids, load_token_ids, plan, refusal, text, write_texts
from places import EXAMPLE

from hcsmoe_hub.calibration.plan import plan_calibration
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


def write_tsv(path: Path, documents: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in ["n\ttext", *(f"1\t{document}" for document in documents)]))


def lines(documents: Sequence[str]) -> bytes:
    return "".join(json.dumps({"text": one}) + "\n" for one in documents).encode()


def compressed(codec: str, content: bytes) -> bytes:
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, codec) as stream:
        stream.write(content)
    return buffer.getvalue().to_pybytes()


def write_gzip(path: Path, documents: Sequence[str]) -> None:
    path.write_bytes(gzip.compress(lines(documents)))


def write_bz2(path: Path, documents: Sequence[str]) -> None:
    path.write_bytes(bz2.compress(lines(documents)))


def write_xz(path: Path, documents: Sequence[str]) -> None:
    path.write_bytes(lzma.compress(lines(documents)))


def write_zst(path: Path, documents: Sequence[str]) -> None:
    path.write_bytes(compressed("zstd", lines(documents)))


def write_lz4(path: Path, documents: Sequence[str]) -> None:
    path.write_bytes(compressed("lz4", lines(documents)))


def write_zip(path: Path, documents: Sequence[str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jsonl", lines(documents))


def write_packed_txt(path: Path, documents: Sequence[str]) -> None:
    path.write_bytes(gzip.compress("\n\n".join(documents).encode()))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_texts),
        ("a.json", write_json),
        ("a.txt", write_txt),
        ("a.parquet", write_parquet),
        ("a.csv", write_csv),
        ("a.jsonl.gz", write_gzip),
        ("a.gz", write_gzip),
        ("a.ndjson", write_texts),
        ("a.tsv", write_tsv),
        ("a.jsonl.bz2", write_bz2),
        ("a.jsonl.xz", write_xz),
        ("a.jsonl.zst", write_zst),
        ("a.jsonl.lz4", write_lz4),
        ("a.jsonl.zip", write_zip),
        ("a.txt.gz", write_packed_txt),
        ("A.JSONL", write_texts),
        ("A.Json", write_json),
        ("A.TXT", write_txt),
        ("A.PARQUET", write_parquet),
        ("A.CSV", write_csv),
        ("A.JSONL.GZ", write_gzip),
        ("A.jsonl.ZST", write_zst),
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


# Folders

DOCUMENTS = [text(start, 7) for start in (0, 50, 100)]
PACKED = [[*ids(start, 7), EOS] for start in (0, 50, 100)]


def packed(load: Load, dataset: Path | str) -> list[list[int]]:
    return sorted(load(dataset, samples=9, sequence_length=8).tolist())


@pytest.mark.parametrize(
    ("names", "write"),
    [
        (["a.jsonl", "b.jsonl", "c.jsonl"], write_texts),
        (["A.JSONL", "B.JSONL", "C.JSONL"], write_texts),
        (["a/a.jsonl", "b/a.jsonl", "c/a.jsonl"], write_texts),
        (["a.jsonl.zst", "b.jsonl.zst", "c.jsonl.zst"], write_zst),
        (["A.JSONL.ZST", "B.JSONL.ZST", "C.JSONL.ZST"], write_zst),
        (
            ["train-00000-of-00003.parquet", "train-00001-of-00003.parquet", "train-00002-of-00003.parquet"],
            write_parquet,
        ),
    ],
    ids=["files", "in capitals", "in folders", "compressed", "compressed, in capitals", "of datasets"],
)
def test_a_folder_gives_the_documents_of_its_files(
    load: Load, tmp_path: Path, names: Sequence[str], write: Callable[[Path, Sequence[str]], Any]
) -> None:
    folder = tmp_path / "texts"
    for name, document in zip(names, DOCUMENTS, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, [document])
    assert packed(load, folder) == PACKED


def test_a_folder_without_a_slash_in_its_name_is_found(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    write_texts(tmp_path / "texts" / "a.jsonl", DOCUMENTS)
    assert packed(load, "texts") == PACKED


@pytest.mark.parametrize("name", ["README.md", ".cache/a.jsonl"])
def test_a_folder_without_text_is_refused_with_the_known_endings(tmp_path: Path, name: str) -> None:
    (tmp_path / "texts" / name).parent.mkdir(parents=True)
    (tmp_path / "texts" / name).write_text("w1")
    error = refusal(lambda: plan(tmp_path / "texts"))
    assert "holds no text files" in error.message
    assert ".jsonl" in error.hint


def test_a_folder_of_save_to_disk_is_read(load: Load, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": document} for document in DOCUMENTS])
    rows.save_to_disk(tmp_path / "rows")
    datasets.DatasetDict(train=rows.select([0]), test=rows).save_to_disk(tmp_path / "splits")
    (arrow,) = (tmp_path / "rows").glob("*.arrow")
    assert packed(load, tmp_path / "rows") == packed(load, arrow) == packed(load, f"{tmp_path}/splits:test") == PACKED
    assert packed(load, tmp_path / "splits") == PACKED[:1]


# Configs and splits

CARD = """---
configs:
- config_name: one
  data_files: one.jsonl
- config_name: two
  data_files:
  - split: held
    path: two.jsonl
  - split: out
    path: three.jsonl
---
"""


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    for name, document in zip(("one", "two", "three"), DOCUMENTS, strict=True):
        write_texts(folder / f"{name}.jsonl", [document])
    return folder


@pytest.mark.parametrize(("parts", "number"), [("one", 0), ("one:train", 0), ("two:held", 1), ("two:out", 2)])
def test_config_and_split_follow_the_name(load: Load, configs: Path, parts: str, number: int) -> None:
    assert packed(load, f"{configs}:{parts}") == [PACKED[number]]


@pytest.mark.parametrize(
    ("parts", "message", "hint"),
    [
        ("", "has the configs one, two, and none is named", ":one'"),
        (":three:train", "has the configs one, two, but not 'three'", ":one'"),
        (":two", ":two has no split 'train'; its splits are held, out", ":two:held'"),
        (":two:train", ":two has no split 'train'; its splits are held, out", ":two:held'"),
        (":one:held", ":one has no split 'held'; its splits are train", ":one:train'"),
    ],
)
def test_a_missing_config_or_split_is_refused_with_those_that_exist(
    load: Load, configs: Path, parts: str, message: str, hint: str
) -> None:
    error = refusal(lambda: load(f"{configs}{parts}"))
    assert message in error.message
    assert hint in error.hint


def test_a_split_of_a_dataset_without_configs_follows_its_name(load: Load, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    write_texts(folder / "validation.jsonl", DOCUMENTS)
    assert packed(load, f"{folder}:validation") == packed(load, f"{folder}::validation") == PACKED
    assert "its splits are validation" in refusal(lambda: load(folder)).message


def test_pictures_next_to_the_text_are_not_decoded(load: Load, tmp_path: Path) -> None:
    rows = [{"text": document, "picture": {"bytes": b"no picture", "path": None}} for document in DOCUMENTS]
    features = datasets.Features({"text": datasets.Value("string"), "picture": datasets.Image()})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    assert packed(load, tmp_path / "a.parquet") == PACKED


# The cache of datasets


def test_the_bundled_text_needs_no_cache(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/dev/null/hf/datasets"))
    assert load("bundled").shape == (2, 4)


def test_a_cache_that_cannot_be_written_to_is_not_blamed_on_the_text(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/dev/null/hf/datasets"))
    error = refusal(lambda: load(write_texts(tmp_path / "a.jsonl", DOCUMENTS)))
    assert "the cache of datasets in /dev/null/hf/datasets cannot be used (Not a directory)" in error.message
    assert "HF_HOME" in error.hint


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
    "plain.jsonl.zst": b'{"text": "w1 w2 w3 w4"}',
    "cut.jsonl.zst": compressed("zstd", lines([text(0, WORDS)]))[:40],
    "gzip.jsonl.xz": COMPRESSED,
    "plain.jsonl.zip": b'{"text": "w1 w2 w3 w4"}',
    "surrogate.jsonl": b'{"text": "w1 \\ud83d w2"}',
    "nested.jsonl": b'{"text": "w1", "n": ' + b"[" * 500 + b"]" * 500 + b"}",
}


def test_lists_that_are_nested_too_deeply_are_refused_with_their_line(load: Load, tmp_path: Path) -> None:
    nested = b'{"text": "w1", "n": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "w1 w2 w3 w4"}\n' + nested)
    assert "line 2 of " in refusal(lambda: load(tmp_path / "a.jsonl")).message


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused(load: Load, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(DAMAGED[name])
    assert f"{tmp_path / name} cannot be read: " in refusal(lambda: load(tmp_path / name)).message
