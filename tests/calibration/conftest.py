"""Fixtures of the calibration tests: a guard against connections, and tokenizers to load text with."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from calibration_text import VOCABULARY, Load, load_token_ids, plan, write_tokenizer
from torch import Tensor

from hcsmoe_hub.calibration import templates

CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that opens a connection fails."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"a connection was opened: {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


class _Kept(templates.Worker):
    """A process that renders the chat templates of all tests: each would take a second to start."""

    def close(self) -> None:
        """The process serves the next test."""

    def end(self) -> None:
        super().close()


@pytest.fixture(scope="session", autouse=True)
def chat_process() -> Iterator[None]:
    """One process renders the chat templates of all tests, until one of them has ended it."""
    kept: list[_Kept] = []

    def worker(memory_bytes: int) -> templates.Worker:
        if memory_bytes != templates.MEMORY_BYTES:
            return real(memory_bytes)
        if not kept or not kept[-1].is_running:
            kept.append(_Kept(memory_bytes))
        return kept[-1]

    real = templates.Worker
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(templates, "Worker", worker)
        yield
    for each in kept:
        each.end()


@pytest.fixture
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a Parquet file, datasets waits five seconds for threads that have long ended."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One id per word, an end of sequence, no chat template."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), eos_token="</s>")


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template: role and content of every message."""
    folder = tmp_path_factory.mktemp("chat")
    return write_tokenizer(folder, eos_token="</s>", chat_template=CHAT_TEMPLATE)


@pytest.fixture
def load(tokenizer: Path) -> Load:
    """Plans and loads with the plain tokenizer."""

    def run(dataset: Path | str, **options: Any) -> Tensor:
        return load_token_ids(plan(dataset, **options), tokenizer_folder=tokenizer, vocab_size=VOCABULARY)

    return run
