"""Calibration text that a model writes: the source itself, or a server of the OpenAI API on 127.0.0.1."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_text import VOCABULARY, plan, refusal, text, write_texts, write_tokenizer
from places import EXAMPLE
from quantized_models import qwen3_fp8

from hcsmoe_hub import CalibrationOptions, ConvertOptions
from hcsmoe_hub import plan as plan_conversion
from hcsmoe_hub.calibration.calibration_set import CalibrationSet
from hcsmoe_hub.calibration.completions import sample_from_server
from hcsmoe_hub.calibration.sources import dataset_name, parse_sources
from hcsmoe_hub.calibration.text import load_calibration
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.events import ignore
from hcsmoe_hub.pipeline.run import load_tokens

# A server


class Completions(ThreadingHTTPServer):
    """A server with one model; ``answers`` are statuses, or bodies, of the next answers that differ from its own."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.answers: list[int | str] = []

    @property
    def address(self) -> str:
        """Where its API is."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    """Lists the model, and writes words that follow from the seed."""

    server: Completions

    def do_GET(self) -> None:
        """Lists the model."""
        self.answer({"data": [{"id": "org/model"}]})

    def do_POST(self) -> None:
        """Writes documents."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        start = 10 * asked["seed"]
        self.answer({"choices": [{"text": text((start + number) % 300, 7)} for number in range(asked["n"])]})

    def answer(self, content: Any) -> None:
        """Sends an answer, or the next of those that were prepared."""
        self.server.keys.append(self.headers["Authorization"])
        prepared = self.server.answers.pop(0) if self.server.answers else 200
        body = (prepared if isinstance(prepared, str) else json.dumps(content)).encode()
        self.send_response(prepared if isinstance(prepared, int) else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Completions]:
    """A running server, and no key."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    running = Completions()
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def first(server: Completions, pauses: list[float] | None = None) -> str:
    """The first document of a server."""
    wait = [] if pauses is None else pauses
    return next(sample_from_server(server.address, seed=3, begin="<s>", sleep=wait.append))


def load(dataset: str, tokenizer: Path, **options: Any) -> CalibrationSet:
    return load_calibration(plan(dataset, **options), tokenizer_folder=tokenizer, vocab_size=VOCABULARY)


def test_text_of_a_server_fills_a_set_and_is_measured_on(server: Completions, tokenizer: Path) -> None:
    found = load(server.address, tokenizer, samples=12)
    assert found.token_ids.shape == (12, 4)
    assert set(found.domains) == set(found.measured_domains) == {"server"}


def test_the_same_seed_asks_for_the_same_text(server: Completions, tokenizer: Path) -> None:
    first_set, second_set = (load(server.address, tokenizer, samples=40, seed=5) for _ in range(2))
    assert torch.equal(first_set.token_ids, second_set.token_ids)
    assert server.asked[0]["seed"] == 5


def test_a_server_is_asked_for_plain_samples_of_its_model(server: Completions) -> None:
    first(server)
    asked = server.asked[0]
    assert (asked["model"], asked["temperature"], asked["top_p"], asked["prompt"]) == ("org/model", 1.0, 1.0, "<s>")
    assert (asked["seed"], server.keys) == (3, [None, None])


def test_the_key_of_the_environment_is_sent(server: Completions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    first(server)
    assert set(server.keys) == {"Bearer secret"}


def test_a_server_mixes_with_other_texts(server: Completions, tokenizer: Path, tmp_path: Path) -> None:
    own = write_texts(tmp_path / "own.jsonl", [text(number, 7) for number in range(90)])
    found = load(f"{server.address}=0.25,{own}=0.75", tokenizer, samples=40)
    assert Counter(found.domains) == {"server": 10, "own.jsonl": 30}


def test_a_passing_failure_is_tried_again(server: Completions) -> None:
    server.answers = [200, 503, 429]
    pauses: list[float] = []
    assert first(server, pauses)
    assert pauses == [1.0, 2.0]


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([503] * 4, "answers /models with 503"),
        ([401], "refuses the request: 401"),
        ([200, 400], "answers /completions with 400"),
        (["<html>"], "something else than JSON"),
        (["{}"], "lists no model"),
        ([200, '{"choices": [{"text": " "}]}'], "without any"),
    ],
    ids=["unavailable", "key", "request", "page", "no model", "blank"],
)
def test_what_a_server_does_wrong_is_said_in_one_message(
    server: Completions, answers: list[int | str], words: str
) -> None:
    server.answers = answers
    error = refusal(lambda: first(server))
    assert words in error.message
    assert server.address in error.message


def test_a_server_that_is_not_there_is_named_without_its_password(server: Completions) -> None:
    port = server.server_address[1]
    server.shutdown()
    server.server_close()
    address = f"http://me:secret@127.0.0.1:{port}/v1"
    error = refusal(lambda: next(sample_from_server(address, seed=0, begin="", sleep=lambda seconds: None)))
    assert f"http://127.0.0.1:{port}/v1 cannot be reached" in error.message
    assert "secret" not in error.message


def test_the_address_of_a_server_is_not_published() -> None:
    (source,) = parse_sources("http://gpu.internal:8000/v1")
    assert (source.is_server, source.is_file, source.parts) == (True, False, ())
    assert dataset_name("http://gpu.internal:8000/v1=0.5,bundled=0.5") == "server=0.5,bundled=0.5"


# The source itself


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short documents, and little to measure on: writing takes time."""
    monkeypatch.setattr("hcsmoe_hub.pipeline.self_text.TOKENS", 24)
    monkeypatch.setattr("hcsmoe_hub.calibration.measured.MEASURED_TOKENS", 64)


def load_self(dataset: str, output: Path, **options: Any) -> CalibrationSet:
    """Text that the example writes."""
    chosen = CalibrationOptions(dataset=dataset, **({"samples": 4, "sequence_length": 16} | options))
    asked = ConvertOptions(experts=4, calibration=chosen, output=output)
    return load_tokens(plan_conversion(EXAMPLE, asked), ignore)


@pytest.mark.usefixtures("no_network", "brief")
def test_a_model_calibrates_on_what_it_writes_itself(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    found, again, other = (load_self("self", tmp_path / "result", seed=seed) for seed in (1, 1, 2))
    assert found.token_ids.shape == (4, 16)
    assert set(found.domains) == {"self"}
    assert torch.equal(found.token_ids, again.token_ids)
    assert not torch.equal(found.token_ids, other.token_ids)
    assert torch.equal(torch.get_rng_state(), state), "other random choices do not change"


@pytest.mark.usefixtures("no_network", "brief")
def test_what_a_model_writes_mixes_with_other_texts(tmp_path: Path) -> None:
    found = load_self("self=0.5,bundled=0.5", tmp_path / "result", samples=8)
    assert Counter(found.sources) == {0: 4, 1: 4}
    assert Counter(found.domains)["self"] == 4


@pytest.mark.usefixtures("no_network", "brief")
def test_a_model_that_does_not_fit_is_refused_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hcsmoe_hub.pipeline.self_text.available_memory", lambda: 1000)
    error = refusal(lambda: load_self("self", tmp_path / "result"))
    assert "MB" in error.message
    assert "http://HOST:PORT/v1" in error.hint


def test_a_source_that_is_never_loaded_as_a_whole_does_not_write_text(tmp_path: Path) -> None:
    own = CalibrationOptions(dataset="self")
    options = ConvertOptions(experts=3, calibration=own, output=tmp_path / "result", measure=False)
    with pytest.raises(PlanError, match="`low_disk`") as caught:
        plan_conversion(EXAMPLE, replace(options, low_disk=True))
    assert "http://" in caught.value.hint
    quantised = qwen3_fp8(tmp_path / "model")
    write_tokenizer(quantised)
    with pytest.raises(PlanError, match="quantised weights") as caught:
        plan_conversion(quantised, options)
    assert "http://" in caught.value.hint
