"""The text of a recovery: what is held out, and how much is read."""

import pytest
import torch
from calibration_text import FIRST, VOCABULARY, refusal, text, write_texts, write_tokenizer
from tiny_models import build

from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import CalibrationError, PlanError
from hcsmoe_hub.events import ignore
from hcsmoe_hub.model.source_model import SourceModel, read_model
from hcsmoe_hub.recovery.options import RecoverOptions
from hcsmoe_hub.recovery.text import RecoveryText, plan_text, read_text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    folder = build(tmp_path_factory.mktemp("text") / "model", vocab_size=VOCABULARY)
    return read_model(LocalSource(write_tokenizer(folder)))


def load(model: SourceModel, data, **others) -> RecoveryText:
    settings = {"sequence_length": 8, "batch_size": 2, "held_out": 0.25}
    options = RecoverOptions(teacher="org/model", data=str(data), **(settings | others))
    return read_text(model, options, plan_text(model, options), ignore)


def test_no_document_is_on_both_sides(model, tmp_path):
    # Document d has the words 10 d to 10 d + 9.
    found = load(model, write_texts(tmp_path / "text.jsonl", [text(10 * number, 10) for number in range(40)]))
    sides = (found.train_NL, found.held_out_ML)
    train, held_out = ({(token - FIRST) // 10 for token in ids.flatten().tolist()} for ids in sides)
    assert not train & held_out
    assert len(found.held_out_ML) == pytest.approx(0.25 * len(found.sequences), abs=2)
    assert torch.equal(found.sequences[len(found.train_NL) :], found.held_out_ML)


def test_the_record_counts_both_sides(model, tmp_path):
    found = load(model, write_texts(tmp_path / "text.jsonl", [text(10 * number, 10) for number in range(40)]))
    record = found.record()
    assert record["dataset"] == "text.jsonl"
    assert record["tokens"] == found.train_NL.numel()
    assert record["held_out_tokens"] == found.held_out_ML.numel()
    assert sum(domain["measured_tokens"] for domain in record["domains"]) == found.held_out_ML.numel()


def test_a_single_document_cannot_be_held_out(model, tmp_path):
    path = write_texts(tmp_path / "text.jsonl", [text(0, 400)])
    assert "none of which could be held out" in refusal(lambda: load(model, path)).message


def test_sequences_are_as_long_as_the_model_allows(model, tmp_path):
    path = write_texts(tmp_path / "text.jsonl", [text(10 * number, 10) for number in range(40)])
    assert load(model, path, sequence_length=None, batch_size=1).train_NL.shape[1] == 64
    error = refusal(lambda: load(model, path, sequence_length=65), PlanError)
    assert "64 positions" in error.message


def test_a_missing_file_is_named_by_its_own_option(model, tmp_path):
    error = refusal(lambda: load(model, tmp_path / "none.jsonl"), CalibrationError)
    assert "`dataset" not in error.message + error.hint
