"""The tokenizer of a checkpoint: ids outside the vocabulary and damaged files are one message."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from calibration_text import FIRST, VOCABULARY, load_token_ids, plan, refusal, text, write_texts, write_tokenizer
from tiny_models import build

from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.evaluation.evaluate import evaluate
from hcsmoe_hub.evaluation.options import EvaluateOptions
from hcsmoe_hub.evaluation.tokens import Tokens

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A copy of the model, to damage."""
    return Path(shutil.copytree(model, tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_ids_of_the_vocabulary_are_accepted(folder: Path) -> None:
    tokens = Tokens(LocalSource(folder), vocab_size=VOCABULARY)
    assert tokens.encode(f"w0 w{VOCABULARY - FIRST - 1}") == [FIRST, VOCABULARY - 1]


def test_an_id_outside_the_vocabulary_is_refused_with_its_number_and_the_size(folder: Path) -> None:
    tokens = Tokens(LocalSource(folder), vocab_size=FIRST + 7)
    error = refusal(lambda: tokens.encode(text(0, 9)), PlanError)
    assert f"the token id {FIRST + 8}, but the model's vocabulary of {FIRST + 7} tokens" in error.message


def test_a_first_token_outside_the_vocabulary_is_refused(folder: Path) -> None:
    edit(folder / CONFIG, bos_token="w300")
    error = refusal(lambda: Tokens(LocalSource(folder), vocab_size=100), PlanError)
    assert f"the token id {FIRST + 300}" in error.message


def test_a_model_with_a_smaller_vocabulary_than_its_tokenizer_is_not_run(words: Path, tmp_path: Path) -> None:
    build(tmp_path / "model", vocab_size=100, max_position_embeddings=256, bos_token_id=None, eos_token_id=0)
    write_tokenizer(tmp_path / "model", eos_token="</s>")
    options = EvaluateOptions(perplexity=words, device="cpu", output=tmp_path / "figures.json")
    assert (
        "vocabulary of 100 tokens ends at 99"
        in refusal(lambda: evaluate(tmp_path / "model", options), PlanError).message
    )


# Each damages one file of a tokenizer. The libraries raise Exception, TypeError, AttributeError, KeyError and others.
DAMAGE: dict[str, tuple[str, Any]] = {
    "a newer model": (FILE, {"model": {"type": "BPE9", "vocab": {}, "merges": []}}),
    "a newer pre-tokenizer": (FILE, {"pre_tokenizer": {"type": "NewFancyPre"}}),
    "a regular expression with a fault": (
        FILE,
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
    ),
    "a post-processor without its tokens": (
        FILE,
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<none>", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
    ),
    "a list": (FILE, "[]"),
    "a file without an end": (FILE, '{"version": '),
    "a config that is a list": (CONFIG, "[]"),
    "a config of nested lists": (CONFIG, '{"a": ' + "[" * 30_000 + "]" * 30_000 + "}"),
    "added tokens as text": (CONFIG, {"added_tokens_decoder": {"5000": "<x>"}}),
    "an end of text that is a list": (CONFIG, {"eos_token": ["</s>"]}),
    "a length that is text": (CONFIG, {"model_max_length": "512"}),
    "an unknown side": (CONFIG, {"padding_side": "up"}),
    "special tokens that are a list": ("special_tokens_map.json", "[]"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_tokenizer_that_fails_in_any_way_is_one_message(folder: Path, tmp_path: Path, kind: str) -> None:
    name, change = DAMAGE[kind]
    if isinstance(change, str):
        (folder / name).write_text(change)
    else:
        edit(folder / name, **change)
    calibrated = plan(write_texts(tmp_path / "text.jsonl", [text(0, 40)]))
    calibrating = refusal(lambda: load_token_ids(calibrated, tokenizer_folder=folder, vocab_size=VOCABULARY))
    evaluating = refusal(lambda: Tokens(LocalSource(folder)).encode(text(0, 40), add_special_tokens=True), PlanError)
    for error in (calibrating, evaluating):
        assert "tokenizer" in error.message
        assert "repair the tokenizer files" in error.hint


def test_a_tokenizer_of_a_newer_library_says_so(folder: Path) -> None:
    edit(folder / FILE, pre_tokenizer={"type": "NewFancyPre"})
    assert "update the tokenizers library" in refusal(lambda: Tokens(LocalSource(folder)), PlanError).hint
