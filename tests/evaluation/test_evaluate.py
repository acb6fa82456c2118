"""Whole evaluations: what is kept in the result file, and what is refused before a model runs."""

import hashlib
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from calibration_text import refusal, write_rows, write_tokenizer
from tiny_models import build, change_config

from hcsmoe_hub.errors import PlanError, SourceError
from hcsmoe_hub.evaluation.evaluate import evaluate
from hcsmoe_hub.evaluation.options import EvaluateOptions
from hcsmoe_hub.events import Stage, StageAdvanced, StageStarted, Warned
from hcsmoe_hub.report import EVALUATION_FILE


@pytest.fixture
def copy(model, tmp_path):
    """The model in a folder that results may be written to."""
    return shutil.copytree(model, tmp_path / "copy")


def run(path, base=None, **options):
    return evaluate(path, EvaluateOptions(base=base, device="cpu", window=16, **options))[0]


def test_everything_is_measured_and_kept_next_to_the_model(copy, base, words, questions):
    events = []
    options = EvaluateOptions(perplexity=words, choices=questions, generate=2, window=16, device="cpu")
    document, file = evaluate(copy, replace(options, base=base), listener=events.append)
    assert file == copy / EVALUATION_FILE
    assert json.loads(file.read_text()) == document
    assert list(document["measures"]) == ["perplexity", "agreement", "loops", "choices"]
    measure = document["measures"]["perplexity"]
    assert measure["file"] == {
        "name": "words.jsonl",
        "sha256": hashlib.sha256(words.read_bytes()).hexdigest(),
        "records": 3,
        "tokens": 97,
    }
    assert measure["settings"] == {"window": 16, "first_token": "</s>", "dtype": "float32", "device": "cpu"}
    assert measure["base_model"]["path"] == base.name
    assert measure["versions"]["torch"] == torch.__version__
    assert document["model"]["path"] == copy.name
    assert document["model"]["fingerprint"] != measure["base_model"]["fingerprint"]
    for name in ("perplexity", "loops", "choices"):
        figures = document["measures"][name]
        assert figures["model"].keys() == figures["base"].keys() == {"overall", "domains"}
    started = next(event for event in events if isinstance(event, StageStarted))
    assert started.stage is Stage.EVALUATE
    assert sum(isinstance(event, StageAdvanced) for event in events) == started.total


def test_runs_add_to_each_other(copy, base, words, questions):
    first = run(copy, base, perplexity=words)
    second = run(copy, choices=questions)
    assert second["measures"]["perplexity"] == first["measures"]["perplexity"]
    assert second["measures"]["choices"]["base"] is None
    third = run(copy, perplexity=words)
    assert third["measures"]["choices"] == second["measures"]["choices"]
    assert third["measures"]["perplexity"]["base"] is None
    assert third["measures"]["perplexity"]["model"] == first["measures"]["perplexity"]["model"]


def test_agreement_outlives_a_measurement_without_the_base(copy, base, words):
    first = run(copy, base, perplexity=words)["measures"]["agreement"]
    assert run(copy, perplexity=words)["measures"]["agreement"] == first
    assert first["base_model"]["path"] == base.name


def test_figures_of_other_weights_are_left_out(copy, words, questions):
    run(copy, perplexity=words)
    shutil.copytree(build(copy.parent / "other", vocab_size=404, max_position_embeddings=256), copy, dirs_exist_ok=True)
    assert list(run(copy, choices=questions)["measures"]) == ["choices"]


def test_figures_of_another_model_in_a_folder_of_the_same_name_are_left_out(model, base, tmp_path, words, questions):
    results = tmp_path / "results.json"
    for source, place in ((model, "one"), (base, "other")):
        shutil.copytree(source, tmp_path / place / "model")
    first = run(tmp_path / "one" / "model", perplexity=words, output=results)
    second = run(tmp_path / "other" / "model", choices=questions, output=results)
    assert first["model"]["path"] == second["model"]["path"] == "model"
    assert list(second["measures"]) == ["choices"]


def test_streaming_gives_the_same_figures_as_memory(copy, base, words, questions, monkeypatch):
    monkeypatch.setattr("hcsmoe_hub.evaluation.loops.CONTINUATION_TOKENS", 8)
    asked = {"perplexity": words, "choices": questions, "generate": 1}
    events = []
    options = EvaluateOptions(**asked, window=16, device="cpu", stream=True, output=copy / "streamed.json")
    there, _ = evaluate(copy, replace(options, base=base), listener=events.append)
    here = run(copy, base, **asked)
    for name in ("choices", "loops"):
        assert there["measures"][name]["model"] == here["measures"][name]["model"]
    for side in ("model", "base"):
        assert there["measures"]["perplexity"][side]["overall"] == pytest.approx(
            here["measures"]["perplexity"][side]["overall"], rel=1e-5
        )
    assert any(isinstance(event, Warned) and "reads all weights" in event.message for event in events)


def test_model_without_tokenizer_is_refused(tmp_path, words):
    folder = build(tmp_path / "bare")
    assert "has no tokenizer" in refusal(lambda: run(folder, perplexity=words), PlanError).message


def test_tokenizer_without_a_token_that_begins_a_text_is_refused(tmp_path, words):
    folder = write_tokenizer(build(tmp_path / "bare"))
    assert "neither a bos_token nor an eos_token" in refusal(lambda: run(folder, perplexity=words), PlanError).message


def test_base_with_another_tokenizer_is_refused(copy, base, tmp_path, words):
    other = write_tokenizer(shutil.copytree(base, tmp_path / "other"), eos_token="user")
    assert "tokenize the text differently" in refusal(lambda: run(copy, other, perplexity=words), PlanError).message


def test_base_with_another_vocabulary_is_refused(copy, tmp_path, words):
    other = write_tokenizer(build(tmp_path / "other", vocab_size=500), eos_token="</s>")
    assert "vocabulary of 404 tokens" in refusal(lambda: run(copy, other, perplexity=words), PlanError).message


def test_window_beyond_the_positions_of_the_model_is_refused(copy, tmp_path):
    text = write_rows(tmp_path / "long.jsonl", [{"text": "w1 " * 400}])
    options = EvaluateOptions(perplexity=text, window=300, device="cpu")
    error = refusal(lambda: evaluate(copy, options), PlanError)
    assert "accepts 256 positions, but the longest sequence has 300" in error.message


def test_choice_without_tokens_is_refused(copy, tmp_path):
    item = {"context": "w1", "choices": [" ", "w2"], "gold": 0}
    file = write_rows(tmp_path / "choices.jsonl", [item])
    assert "has no tokens" in refusal(lambda: run(copy, choices=file), PlanError).message


@pytest.mark.parametrize("content", ["no json", "[]", '{"schema_version": 99, "measures": {}}'])
def test_foreign_result_file_is_left_alone(copy, words, content):
    (copy / EVALUATION_FILE).write_text(content)
    assert "holds no results" in refusal(lambda: run(copy, perplexity=words), PlanError).message
    assert (copy / EVALUATION_FILE).read_text() == content


def test_result_needs_a_folder_that_exists(copy, words):
    for output, reason in ((copy / "none" / "file.json", "there is no folder"), (copy, "is a folder")):
        assert reason in refusal(lambda output=output: run(copy, perplexity=words, output=output), PlanError).message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_cannot_be_written_to_is_refused_at_once(copy, words):
    copy.chmod(0o555)
    try:
        assert "cannot be written" in refusal(lambda: run(copy, perplexity=words), PlanError).message
    finally:
        copy.chmod(0o755)


def test_config_that_does_not_build_a_model_is_refused(copy, words):
    change_config(copy, hidden_size="wide")
    assert "config.json" in refusal(lambda: run(copy, perplexity=words), SourceError).message
