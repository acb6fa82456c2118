"""The cost of running models: what is measured, what is left out, and why."""

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build

from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.evaluation import cost as cost_module
from hcsmoe_hub.evaluation import cost_process
from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.evaluation.cost_options import CostOptions, Engine
from hcsmoe_hub.evaluation.cost_rows import cost_notes, cost_rows
from hcsmoe_hub.evaluation.cost_timing import prompts, run, throughput
from hcsmoe_hub.evaluation.cost_vllm import time_in_vllm
from hcsmoe_hub.evaluation.evaluate import evaluate
from hcsmoe_hub.evaluation.options import EvaluateOptions
from hcsmoe_hub.events import StageAdvanced, StageStarted

SMALL = {"prompt_tokens": 12, "new_tokens": 3, "repetitions": 2, "batch_sizes": (1, 2)}
FEW = {"vocab_size": 64, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of four experts and its base of eight, without tokenizers."""
    folder = tmp_path_factory.mktemp("cost")
    return build(folder / "model", num_local_experts=4, **FEW), build(folder / "base", **FEW)


def measured(folder: Path, base: Path | None, **options: Any) -> Any:
    wanted = EvaluateOptions(base=base, device="cpu", cost=CostOptions(**{**SMALL, **options}))
    return evaluate(folder, wanted)[0]["measures"]["cost"]


@pytest.fixture(scope="module")
def cost(pair: tuple[Path, Path]) -> Any:
    """The cost of both, and the events of measuring it."""
    events: list[Any] = []
    options = EvaluateOptions(base=pair[1], device="cpu", cost=CostOptions(**SMALL))
    document, file = evaluate(pair[0], options, listener=events.append)
    assert json.loads(file.read_text()) == document
    started = next(event for event in events if isinstance(event, StageStarted))
    assert sum(isinstance(event, StageAdvanced) for event in events) == started.total
    return document["measures"]["cost"]


def test_a_model_without_a_tokenizer_is_counted_and_measured(cost: Any) -> None:
    settings = cost["settings"]
    assert settings["batch_sizes"] == [1, 2]
    assert (settings["device"], settings["order"], settings["engine"]) == ("cpu", "in turns", "torch")
    assert settings["dtype"] == "float32"
    assert settings["machine"].endswith(f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}")
    model, base = cost["model"], cost["base"]
    assert model["parameters"] < base["parameters"]
    assert model["disk_bytes"] < base["disk_bytes"]
    # The router alone has fewer rows.
    assert 0 < base["decode_flops"] - model["decode_flops"] == 2 * 2 * 4 * 32
    assert 0 < base["active_parameters"] - model["active_parameters"] == 2 * 4 * 32
    for figures in (model, base):
        assert figures["throughput"].keys() == figures["peak_memory"]["batches"].keys() == {"1", "2"}
        for batch in figures["throughput"].values():
            for part in (batch["prefill"], batch["decode"]):
                spread = part["tokens_per_second"]
                assert 0 < spread["min"] <= spread["median"] <= spread["max"]
        assert 0 < figures["peak_memory"]["process"] <= figures["peak_memory"]["batches"]["1"]
        problems = [figures[f"{name}_problem"] for name in ("flops", "throughput", "peak_memory")]
        assert problems == [None, None, None]


def test_neither_paths_nor_names_of_machines_are_recorded(cost: Any, pair: tuple[Path, Path]) -> None:
    text = json.dumps(cost)
    assert str(pair[0].parent) not in text
    assert platform.node() not in text


def test_counting_alone_loads_no_weights(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(pair[0], tmp_path / "model")
    found = measured(folder, None, timing=False)
    assert found["base"] is None
    assert found["model"]["prefill_flops"] > 0
    assert found["model"]["throughput"] is found["model"]["peak_memory"] is None
    assert found["model"]["throughput_problem"] == "timing is switched off"
    names = [row.name for row in cost_rows(found)]
    assert names[-1] == "FLOPs per token, after 12 tokens"
    assert len(cost_notes(found)) == 1


def test_a_model_that_does_not_fit_is_counted_and_the_reason_is_recorded(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(pair[0], tmp_path / "model")
    sizes = [checkpoint.nbytes for checkpoint in map(Checkpoint, map(LocalSource, pair))]
    # Enough for the model, too little for its base.
    monkeypatch.setattr(cost_module, "free_bytes", lambda device: int(sizes[0] / 0.8) + 1)
    found = measured(folder, pair[1])
    assert found["settings"]["order"] == "one after another"
    assert found["model"]["throughput"] is not None
    assert found["base"]["throughput"] is found["base"]["peak_memory"] is None
    assert found["base"]["decode_flops"] > 0
    assert "too much for the" in found["base"]["throughput_problem"]
    notes = " ".join(cost_notes(found))
    assert "Throughput of the base: left out, as its weights take" in notes
    row = next(row for row in cost_rows(found) if row.name == "Decode, batch 2, tokens/s")
    assert (row.base, row.ratio) == ("-", "-")


def test_more_positions_than_the_model_has_are_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(PlanError) as found:
        measured(pair[0], None, prompt_tokens=62)
    assert "accepts 64 positions, but a prompt of 62 tokens and 3 new ones take 65" in found.value.message
    assert found.value.option == "prompt_tokens"


def test_prompts_are_as_long_as_models_accept_unless_their_length_was_asked_for(pair: tuple[Path, Path]) -> None:
    found = measured(*pair, prompt_tokens=None, new_tokens=10, timing=False)
    assert found["settings"]["prompt_tokens"] == 64 - 10
    with pytest.raises(PlanError, match="a prompt of 1 token and 64 new ones take 65") as refused:
        measured(pair[0], None, prompt_tokens=None, new_tokens=64, timing=False)
    assert refused.value.option == "new_tokens"
    long = CostOptions().fitting({"model": 4096, "base": None})
    assert long.prompt_tokens == 256


def test_an_engine_that_is_not_installed_is_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(PlanError, match="not installed") as found:
        measured(pair[0], None, engine=Engine.VLLM)
    assert found.value.option == "engine"


def test_prompts_are_the_same_in_every_run_and_below_the_vocabulary() -> None:
    options = CostOptions(**SMALL)
    ids = prompts(3, options, 50)
    assert ids == prompts(3, options, 50)
    assert [len(row) for row in ids] == [12, 12, 12]
    assert 0 <= min(map(min, ids)) <= max(map(max, ids)) < 50


def test_every_run_generates_all_tokens_whatever_ends_a_text(pair: tuple[Path, Path]) -> None:
    skeleton = Checkpoint(LocalSource(pair[0])).filled(torch.device("cpu"), lambda event: None)
    steps = []
    skeleton.module.register_forward_hook(lambda module, args, output: steps.append(output.logits.shape))
    took = run(skeleton, prompts(2, CostOptions(**SMALL), 64), 3, torch.device("cpu"))
    assert min(took) > 0
    # One pass over the prompts, and one for each further token.
    assert steps == [(2, 1, 64)] * 4


def test_rates_follow_from_the_tokens_of_all_prompts() -> None:
    found = throughput([(1.0, 2.0), (2.0, 4.0), (4.0, 8.0)], 2, CostOptions(**SMALL))
    assert found["prefill"]["seconds"] == {"median": 2.0, "min": 1.0, "max": 4.0}
    assert found["prefill"]["tokens_per_second"] == {"median": 12.0, "min": 6.0, "max": 24.0}
    assert found["decode"]["tokens_per_second"] == {"median": 1.5, "min": 0.75, "max": 3.0}


def test_a_process_that_fails_answers_nothing() -> None:
    request = {
        "wanted": "peak", "location": "/no/such/folder", "revision": None, "options": SMALL, "device": "cpu",
        "dtype": "float32", "vocab_size": 64, "token": None, "cache_dir": None,
    }  # fmt: skip
    command = [sys.executable, "-m", cost_process.__name__]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    assert done.returncode
    assert done.stdout == ""


# A stand-in for vLLM, which cannot be installed everywhere: it records what it is asked for.
VLLM = """
calls = []

class SamplingParams:
    def __init__(self, **given):
        self.given = given

class LLM:
    def __init__(self, **given):
        calls.append(given)

    def generate(self, prompts, settings, use_tqdm):
        calls.append((len(prompts), len(prompts[0]["prompt_token_ids"]), settings.given))
"""


def test_vllm_runs_prompts_to_the_first_token_and_to_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm.py").write_text(VLLM)
    monkeypatch.syspath_prepend(tmp_path)
    found = time_in_vllm("folder", None, CostOptions(**SMALL, engine=Engine.VLLM), vocab_size=64)
    assert found.keys() == {"1", "2"}
    calls = sys.modules.pop("vllm").calls
    assert calls[0]["max_model_len"] == 16
    assert calls[0]["enable_prefix_caching"] is False
    assert [call[:2] for call in calls[1:]] == [(1, 12)] * 6 + [(2, 12)] * 6
    assert [call[2]["max_tokens"] for call in calls[1:]] == [1, 4] * 6
    assert all(call[2]["ignore_eos"] for call in calls[1:])
