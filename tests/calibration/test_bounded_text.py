"""Text files are looked at before a library parses them: lines, paragraphs, rows and nesting have bounds."""

import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet as parquet
import pytest

from hcsmoe_hub.calibration import bounded_files, bounded_text, rows
from hcsmoe_hub.calibration.bounded_text import DEEPEST, LONGEST
from hcsmoe_hub.calibration.rows import read_rows
from hcsmoe_hub.calibration.sources import parse_sources
from hcsmoe_hub.errors import CalibrationError

LINE = b'{"text": "some words"}\n'
DEEP = b'{"text": "a", "b": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001 + b"\n"


def read(path: Path) -> list[object]:
    """All rows of a file, in the order of calibration."""
    return list(read_rows(parse_sources(str(path))[0], seed=1))


def refusal(path: Path, content: bytes) -> str:
    """Why a file is refused."""
    path.write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        read(path)
    assert caught.value.hint
    return caught.value.message


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of at most 10,000 bytes, rows of at most 40,000."""
    monkeypatch.setattr(bounded_text, "LONGEST", 10_000)
    monkeypatch.setattr(bounded_text, "LONGEST_ROW", 40_000)


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("odd [name] *?.jsonl", bytes), ("a.json", bytes)],
)
def test_rows_come_in_the_order_in_which_datasets_shuffles_them(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    content = b"".join(json.dumps({"text": f"text {number}", "n": number}).encode() + b"\n" for number in range(500))
    (tmp_path / name).write_bytes(pack(content))
    (tmp_path / "plain.jsonl").write_bytes(content)
    usual = datasets.load_dataset("json", data_files=str(tmp_path / "plain.jsonl"), split="train", streaming=True)
    assert read(tmp_path / name) == list(usual.shuffle(seed=1, buffer_size=rows.SHUFFLE_BUFFER))


def test_a_line_that_is_nested_too_deeply_is_named(tmp_path: Path) -> None:
    assert "line 3 of" in (message := refusal(tmp_path / "a.jsonl", LINE * 2 + DEEP + LINE))
    assert "nested too deeply" in message


def test_brackets_inside_text_do_not_count(tmp_path: Path) -> None:
    text = '[{"\\' * 1000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "b.json").write_text(json.dumps([{"text": text}, {"text": "b"}], indent=1))
    assert read(tmp_path / "a.jsonl") == [{"text": text}]
    assert len(read(tmp_path / "b.json")) == 2


@pytest.mark.parametrize("content", [b"[" * 100_000 + b"]" * 100_000, b'[{"a": ' + b"[" * 300 + b"]" * 300 + b"}]"])
def test_a_list_that_is_nested_too_deeply_is_refused(tmp_path: Path, content: bytes) -> None:
    assert f"more than {DEEPEST} lists" in refusal(tmp_path / "a.json", content)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", LINE + b'{"text": "' + b"x" * 20_000 + b'"}\n', "line 2 of"),
        ("a.csv", b"text\nb\n" + b"x" * 20_000 + b"\n", "line 3 of"),
        ("a.txt", b"a paragraph\n\n" + b"a line\n" * 3000, "paragraph that ends in or after line"),
        ("a.csv", b'text,b\n"' + b"abc,def\n" * 9000, "a quotation mark is not closed"),
        ("a.json", b'[{"text": "' + b"x" * 2_100_000 + b'"}]', "a text of more than 10000 bytes"),
    ],
)
@pytest.mark.usefixtures("short")
def test_a_document_that_is_too_long_is_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    assert reason in refusal(tmp_path / name, content)


@pytest.mark.usefixtures("short")
def test_what_is_compressed_is_measured_as_it_is_unpacked(tmp_path: Path) -> None:
    long = LINE + b'{"text": "' + b"x" * 20_000 + b'"}\n'
    assert "line 2 of" in refusal(tmp_path / "a.jsonl.gz", gzip.compress(long))
    with zipfile.ZipFile(tmp_path / "b.jsonl.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b.jsonl", long)
    with pytest.raises(CalibrationError, match="line 2 of"):
        read(tmp_path / "b.jsonl.zip")


@pytest.mark.usefixtures("short")
def test_files_of_a_folder_are_looked_at_as_well(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(LINE * 3 + DEEP)
    with pytest.raises(CalibrationError, match=r"a\.jsonl cannot be read: line 4 of"):
        read(tmp_path / "texts")


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    assert "line 4 of" in (message := refusal(tmp_path / "a.jsonl", LINE * 3 + b"{]\n" + LINE))
    assert "is not JSON" in message


def test_fewer_long_rows_are_held_to_be_shuffled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_SMALL_BYTES", 1000)
    monkeypatch.setattr(rows, "BUFFER_BYTES", 10_000)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number:01000}"}) + "\n" for number in range(100)))
    places = [int(row["text"]) for row in read(path)]  # type: ignore[index]
    assert sorted(places) == list(range(100))
    # No row comes before those that are far in front of it.
    assert max(place - number for number, place in enumerate(places)) <= 11


def test_a_table_whose_parts_do_not_fit_into_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pyarrow.table({"text": ["some words"] * 100_000})
    parquet.write_table(table, tmp_path / "a.parquet")
    monkeypatch.setattr(bounded_files, "available_memory", lambda: 4 * 100)
    with pytest.raises(CalibrationError, match="its row group 0 has"):
        read(tmp_path / "a.parquet")


def test_a_document_may_be_as_long_as_any_book() -> None:
    assert LONGEST > 10_000_000
