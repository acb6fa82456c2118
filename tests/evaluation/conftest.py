"""A tiny model with a tokenizer, a slightly different one, and files to measure both on."""

import shutil
from pathlib import Path

import pytest
import torch
from calibration_text import VOCABULARY, write_rows, write_tokenizer
from tiny_models import build, change_tensors

from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.evaluation.scorers import LoadedScorer, StreamedScorer

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral of two layers, which takes 256 positions."""
    folder = tmp_path_factory.mktemp("evaluated") / "base"
    build(folder, vocab_size=VOCABULARY, max_position_embeddings=256, bos_token_id=None, eos_token_id=0)
    return write_tokenizer(folder, eos_token="</s>")


@pytest.fixture(scope="session")
def model(base: Path) -> Path:
    """The same with other routers."""
    folder = base.parent / "model"
    shutil.copytree(base, folder)

    def turn(tensors):
        for name in tensors:
            if "gate" in name:
                tensors[name] = tensors[name].flip(0)

    change_tensors(folder, turn)
    return folder


@pytest.fixture(scope="session")
def loaded(model: Path) -> LoadedScorer:
    """The model in memory."""
    return LoadedScorer(Checkpoint(LocalSource(model)), CPU)


@pytest.fixture(scope="session")
def streamed(model: Path) -> StreamedScorer:
    """The model layer by layer, a few sequences per pass."""
    return StreamedScorer(Checkpoint(LocalSource(model)), CPU, pass_tokens=60)


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of two domains: records of 50, 7 and 40 words."""
    rows = [
        {"text": words_text(0, 50), "domain": "prose"},
        {"text": words_text(90, 7), "domain": "code"},
        {"text": words_text(20, 40), "domain": "prose"},
    ]
    return write_rows(tmp_path_factory.mktemp("text") / "words.jsonl", rows)


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions with three choices of unequal lengths."""
    rows = [
        {
            "id": number,
            "domain": "prose" if number % 2 else "code",
            "context": words_text(7 * number, 3 + number % 4),
            "choices": [words_text(11 * number + 30 * choice, 1 + (number + choice) % 5) for choice in range(3)],
            "gold": number % 3,
        }
        for number in range(12)
    ]
    return write_rows(tmp_path_factory.mktemp("choices") / "questions.jsonl", rows)


def words_text(start: int, count: int) -> str:
    """Words in an order that does not repeat."""
    return " ".join(f"w{(start + 37 * number + number * number) % 400}" for number in range(count))
