"""Every kind of expert is refitted, or refused with what it does otherwise."""

from pathlib import Path

import pytest
from architectures import save_tiny
from tiny_models import options, refuse, token_ids

from hcsmoe_hub import convert
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.layer import refit_block as blocks
from hcsmoe_hub.methods.refit import experts as fit_experts
from hcsmoe_hub.options import MethodOptions, Preset, Refit
from hcsmoe_hub.report import RefitReport

IDS = token_ids(16, 32)


def refits(folder: Path, model_type: str, refit: Refit) -> list[RefitReport]:
    """What a refit did to the layers of a tiny model."""
    save_tiny(model_type, folder / "model")
    wanted = options(folder / "model", 3, ids=IDS, method=MethodOptions(preset=Preset.HC_SMOE, refit=refit))
    return [layer.refit for layer in convert(folder / "model", wanted).layers if layer.refit is not None]


@pytest.mark.parametrize("model_type", ["gpt_oss", "nemotron_h", "dbrx", "gemma4_text", "zaya", "deepseek_v3"])
def test_every_kind_of_expert_is_corrected(tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_experts, "ROUNDS", 2)
    found = refits(tmp_path, model_type, Refit.EXPERTS)
    assert max(refit.rounds for refit in found) > 1
    assert all(refit.error_after < refit.error_before for refit in found if refit.is_kept)


# Biases, a correction bias next to the router, and a table that leads two choices of a token to one merged expert.
@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v3", "deepseek_v4"])
def test_every_kind_of_block_is_reconstructed(tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_experts, "ROUNDS", 1)
    monkeypatch.setattr(blocks, "BLOCK_STEPS", 10)
    # Small enough to help a layer of random weights, whatever its kind.
    monkeypatch.setattr(blocks, "RATE", 0.002)
    found = refits(tmp_path, model_type, Refit.BLOCKS)
    assert any(refit.steps for refit in found)
    assert all(refit.error_after < refit.error_before for refit in found)


@pytest.mark.parametrize("refit", [Refit.DOWN, Refit.EXPERTS, Refit.BLOCKS])
def test_experts_whose_input_is_scaled_are_refused(tmp_path: Path, refit: Refit) -> None:
    save_tiny("llama4_text", tmp_path / "model")
    wanted = options(tmp_path / "model", 3, method=MethodOptions(preset=Preset.HC_SMOE, refit=refit))
    error = refuse(tmp_path / "model", PlanError, wanted)
    assert error.message.startswith(f"`refit='{refit}'` fits sums of router weight times neuron, but in ")
    assert error.message.endswith("the weight is applied before an expert's first projection.")
    assert error.hint == "use `refit='none'`"


def test_blocks_that_are_the_layer_itself_are_refused_where_they_would_run_on_single_tokens(tmp_path: Path) -> None:
    save_tiny("gemma4_text", tmp_path / "model")
    wanted = options(tmp_path / "model", 3, method=MethodOptions(preset=Preset.HC_SMOE, refit=Refit.BLOCKS))
    error = refuse(tmp_path / "model", PlanError, wanted)
    assert error.message.startswith("`refit='blocks'` runs the MoE block of a layer again on single tokens, but in ")
    assert error.hint == "leave `refit` out"
