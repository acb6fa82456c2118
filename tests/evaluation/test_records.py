"""Evaluation files: what is read, and one clear refusal for each kind of damage."""

import hashlib
import json

import pytest
from calibration_text import refusal, write_rows

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.evaluation.options import EvaluateOptions
from hcsmoe_hub.evaluation.records import read_choices, read_texts

ITEM = {"context": "w1", "choices": ["w2", "w3"], "gold": 1}


def test_text_keeps_its_domain_and_its_file_is_named(tmp_path):
    file = write_rows(tmp_path / "text.jsonl", [{"text": "w1", "domain": "prose"}, {"text": "w2"}, {"text": " "}])
    records, found = read_texts(file)
    assert [(record.text, record.domain) for record in records] == [("w1", "prose"), ("w2", None)]
    assert (found.name, found.records) == ("text.jsonl", 2)
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_line_separators_inside_a_text_do_not_end_a_record(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert [record.text for record in read_texts(file)[0]] == ["a\u2028b\x85c"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ('{"text": " "}', "holds no text"),
        ('{"body": "w1"}', "line 1 .* has no text: its columns are body"),
        ('{"text": "w1"}\n{"text": 3}', "line 2"),
        ('{"text": "w1", "domain": 3}', "has the domain 3"),
        ("[1]", "is not a JSON object"),
        ("w1", "is not valid JSON"),
        ('{"text": "w1"}\n{"text": "w1 \\ud83d w2"}', r"line 2 .* half of a surrogate pair, '\\ud83d'"),
        ('{"text": "w1", "domain": "\\udc00"}', "line 1 .* half of a surrogate pair"),
        ('{"\\ud83d": "w1"}', r"line 1 .* its columns are \\ud83d"),
        ('{"text": "w1", "n": 1' + "0" * 5000 + "}", "line 1 .* number with too many digits"),
        ('{"text": "w1", "n": ' + "[" * 20_000 + "]" * 20_000 + "}", "line 1 .* nested too deeply"),
        ('{"text": "w1", "domain": [' + "1, " * 5000 + "1]}", r"has the domain \[1, 1, .{40,60}, which is not text"),
    ],
)
def test_text_that_cannot_be_used_is_refused(tmp_path, content, words):
    file = tmp_path / "text.jsonl"
    file.write_text(content)
    with pytest.raises(PlanError, match=words):
        read_texts(file)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_text_in_another_encoding_is_refused_with_its_line(tmp_path, encoding):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "caf\xe9"}\n', encoding=encoding)
    assert "line 1" in refusal(lambda: read_texts(file), PlanError).message


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "w1"}\n', encoding="utf-8-sig")
    assert [record.text for record in read_texts(file)[0]] == ["w1"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gold": 2}, "has gold 2, but its choices are numbered 0 to 1"),
        ({"gold": -1}, "has gold -1"),
        ({"gold": True}, "has gold True"),
        ({"choices": ["w2"]}, "a list of two or more texts"),
        ({"choices": ["w2", ""]}, "a list of two or more texts"),
        ({"context": None}, "a context that is not text"),
        ({"gold": "A" * 5000}, "has gold 'A{50,60}, but"),
        ({"context": "w1 \ud83d"}, "half of a surrogate pair"),
        ({"choices": ["w2", "\udc00"]}, "half of a surrogate pair"),
    ],
)
def test_question_that_contradicts_itself_is_refused(tmp_path, change, words):
    file = write_rows(tmp_path / "choices.jsonl", [ITEM, ITEM | change])
    with pytest.raises(PlanError, match=f"line 2 of .* {words}"):
        read_choices(file)


def test_question_without_its_columns_is_refused(tmp_path):
    file = write_rows(tmp_path / "choices.jsonl", [{"context": "w1"}])
    error = refusal(lambda: read_choices(file), PlanError)
    assert "lacks choices and gold: its columns are context" in error.message


def test_missing_file_is_refused(tmp_path):
    assert "there is no file" in refusal(lambda: read_texts(tmp_path / "none.jsonl"), PlanError).message


def test_file_whose_name_is_too_long_is_refused(tmp_path):
    assert "cannot be read" in refusal(lambda: read_texts(tmp_path / ("x" * 300)), PlanError).message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "there is nothing to measure"),
        ({"generate": 3, "tasks": ("boolq",)}, "needs text"),
        ({"limit": 8}, "`limit=8` would have no effect"),
        ({"limit": 0, "tasks": ("boolq",)}, "0 is too small"),
        ({"window": 0, "tasks": ("boolq",)}, "0 is too small"),
    ],
)
def test_options_out_of_range_or_with_nothing_to_measure_are_refused(options, words):
    assert words in refusal(lambda: EvaluateOptions(**options).check(), PlanError).message
