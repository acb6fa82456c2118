"""Tiny checkpoints under published names, of odd sizes: nothing is lost at N experts, and half of them verifies."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from architectures import SUPPORTED
from tiny_models import differing, read_config, read_tensors
from torch import Tensor

from hcsmoe_hub import CalibrationOptions, ConversionReport, ConvertOptions, MethodOptions, Preset, convert, verify
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.model.architectures import FAMILIES
from hcsmoe_hub.model.wrong_experts import run_chosen_experts
from hcsmoe_hub.result import reload
from published.catalogue import CHECKPOINTS
from published.checkpoint import Checkpoint
from published.saved import MODELS, SavedModel
from published.sizes import TEXT_IDS, text_section
from published.test_plans import REFUSALS

# transformers loads these on an accelerator only, or with libraries that are not installed.
NOT_LOADED_HERE = {"fp8", "compressed-tensors"}


def representatives() -> list[str]:
    """One checkpoint of each kind of names and format."""
    found = {}
    for name, checkpoint in CHECKPOINTS.items():
        if name not in REFUSALS:
            config = checkpoint.config()
            kind = (checkpoint.tensors.__name__, config["model_type"], quantization(config))
            found.setdefault(kind, name)
    return list(found.values())


def quantization(config: dict[str, Any]) -> str | None:
    """Name of the format of quantised weights."""
    sections = (config, text_section(config))
    found = [section["quantization_config"]["quant_method"] for section in sections if "quantization_config" in section]
    return found[0] if found else None


TINY: list[Checkpoint | SavedModel] = [*(CHECKPOINTS[name] for name in representatives()), *MODELS]


@pytest.fixture(scope="module", params=TINY, ids=lambda checkpoint: checkpoint.name)
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint | SavedModel:
    return request.param


@pytest.fixture(scope="module")
def source(checkpoint: Checkpoint | SavedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint."""
    return checkpoint.write_tiny(tmp_path_factory.mktemp(checkpoint.name))


@pytest.fixture
def load_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification without a fresh process, which would import its libraries anew for every checkpoint."""

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["reload", *command[command.index(reload.__name__) + 1 :]])
        with redirect_stdout(io.StringIO()) as stdout:
            reload.main()
        return SimpleNamespace(returncode=0, stdout=stdout.getvalue(), stderr="")

    monkeypatch.setattr(subprocess, "run", run)


def run(source: Path, output: Path, experts: int) -> ConversionReport:
    """Converts on a few random sequences of text."""
    ids = output.with_suffix(".npy")
    np.save(ids, np.random.default_rng(0).integers(3, TEXT_IDS, (4, 16)))
    options = ConvertOptions(
        experts=experts,
        method=MethodOptions(preset=Preset.HC_SMOE),
        output=output,
        device="cpu",
        calibration=CalibrationOptions(dataset=str(ids)),
    )
    return convert(source, options)


def logits(folder: Path) -> Tensor:
    """Logits ``[2, 12, V]`` of the class that the config names, loaded without any settings."""
    (name,) = read_config(folder)["architectures"]
    kind = getattr(transformers, name, transformers.AutoModelForCausalLM)
    model = kind.from_pretrained(folder).eval()
    run_chosen_experts(model)
    ids = torch.arange(3, 27).view(2, 12)
    labels = {"labels": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    with torch.no_grad():
        result: Tensor = getattr(model, "thinker", model)(input_ids=ids, use_cache=False, **labels).logits
    return result


def test_every_supported_architecture_has_a_tiny_checkpoint_of_published_names() -> None:
    kinds = {CHECKPOINTS[name].config()["model_type"] for name in representatives()}
    kinds |= {model.model_type for model in MODELS}
    # transformers saves models of text alone under the names that its conversions lead back to: test_conformance.py.
    kinds |= {family.model_type for family in FAMILIES if family.model_type in SUPPORTED}
    assert {family.model_type for family in FAMILIES if not family.refusal} - kinds == set()


def test_keeping_every_expert_keeps_every_bit(
    checkpoint: Checkpoint | SavedModel, source: Path, tmp_path: Path
) -> None:
    run(source, tmp_path / "result", checkpoint.experts)
    assert differing(read_tensors(tmp_path / "result"), read_tensors(source)) == []
    assert read_config(tmp_path / "result") == read_config(source)
    if quantization(read_config(source)) not in NOT_LOADED_HERE:
        # Where a file puts its tensors in memory decides how sums of them are rounded.
        torch.testing.assert_close(logits(tmp_path / "result"), logits(source), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("load_here")
def test_half_of_the_experts_verifies_against_the_source(
    checkpoint: Checkpoint | SavedModel, source: Path, tmp_path: Path
) -> None:
    half = checkpoint.experts // 2
    report = run(source, tmp_path / "result", half)
    assert verify(tmp_path / "result", against=LocalSource(source)).experts == half
    assert report.layers
    assert json.loads((tmp_path / "result" / "config.json").read_text()).keys() == read_config(source).keys()
