"""Plans for published checkpoints: right for those that can be converted, and refused in a true sentence otherwise."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, Preset, plan
from hcsmoe_hub.errors import HcsmoeError
from hcsmoe_hub.planning.sizes import parameter_counts
from published.catalogue import CHECKPOINTS
from published.checkpoint import Checkpoint
from published.sizes import EXPERT_KEYS, text_section

# What each refusal says after the name of the checkpoint.
REFUSALS = {
    "ERNIE-4.5-VL-28B-A3B-PT": "one expert count sizes both its experts for text and its experts for images",
    "LLaMA-MoE-v1-3_5B-4_16": "model_type 'llama_moe' is not part of transformers",
    "Ling-1T": "model_type 'bailing_moe' is not part of transformers",
    "Ling-lite-1.5": "model_type 'bailing_moe' is not part of transformers",
    "LongCat-Flash-Chat": "gives its zero-computation experts weights that no published checkpoint has",
    "Mixtral-8x7B-v0.1-GPTQ": "quantised with GPTQ",
    "Qwen3-30B-A3B-NVFP4": "quantised with ModelOpt NVFP4",
    "SmallThinker-21BA3B-Instruct": "model_type 'smallthinker' is not part of transformers",
    "grok-2": "model_type 'git'",
}
PLANNED = [name for name in CHECKPOINTS if name not in REFUSALS]
# Checkpoints of more tensors than that are planned with their first layers, in which every kind of layer occurs.
MANY_TENSORS, FIRST_LAYERS = 500, 6


@pytest.fixture(autouse=True)
def large_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of 100 TB: what a result needs must not decide about its plan."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**14, used=0, free=10**14))


def number_of_experts(checkpoint: Checkpoint) -> int:
    """Experts of each layer, as the config says."""
    config = text_section(checkpoint.config())
    sections = (config, config.get("ffn_config") or {})
    return next(section[key] for section in sections for key in EXPERT_KEYS if key in section)


def keep(experts: int, folder: Path) -> ConvertOptions:
    """Options that keep a number of experts, with token ids as calibration text."""
    ids = folder / "ids.npy"
    np.save(ids, np.arange(3, 35).reshape(2, 16))
    return ConvertOptions(
        experts=experts,
        # The default method is not for every architecture.
        method=MethodOptions(preset=Preset.HC_SMOE),
        output=folder / "result",
        device="cpu",
        calibration=CalibrationOptions(dataset=str(ids)),
    )


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if CHECKPOINTS[name].billions])
def test_stored_tensors_have_the_published_number_of_parameters(name: str) -> None:
    checkpoint = CHECKPOINTS[name]
    counted = checkpoint.collect(checkpoint.config()).parameters
    assert counted / 1e9 == pytest.approx(checkpoint.billions, rel=0.01)


@pytest.mark.parametrize("name", PLANNED)
def test_published_checkpoint_plans_with_all_of_its_parameters(name: str, tmp_path: Path) -> None:
    checkpoint = CHECKPOINTS[name]
    is_large = len(checkpoint.collect(checkpoint.config()).items) > MANY_TENSORS
    layers = FIRST_LAYERS if is_large else None
    source = tmp_path / name
    source.mkdir()
    options = keep(number_of_experts(checkpoint) // 2, tmp_path)
    made = plan(checkpoint.write_holes(source, layers), options)
    counts = parameter_counts(made)
    assert counts["before"] == pytest.approx(checkpoint.collect(checkpoint.config(layers)).parameters, rel=0.01)
    assert counts["after"] < 0.95 * counts["before"]


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_checkpoint_says_why_in_one_sentence(name: str, tmp_path: Path) -> None:
    checkpoint = CHECKPOINTS[name]
    source = tmp_path / name
    source.mkdir()
    with pytest.raises(HcsmoeError) as caught:
        plan(checkpoint.write_holes(source), keep(4, tmp_path))
    assert REFUSALS[name] in caught.value.message
    assert caught.value.message.endswith(".")
    assert caught.value.hint
