"""Every kind of block is refitted, or refused with what it does otherwise."""

from pathlib import Path

import pytest
from architectures import SUPPORTED, save_tiny
from tiny_models import options, refuse, token_ids

from hcsmoe_hub import convert
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.options import MethodOptions, Preset, Refit
from hcsmoe_hub.report import RefitReport

IDS = token_ids(16, 32)


def refits(folder: Path, model_type: str, refit: Refit) -> list[RefitReport]:
    """What a refit did to the layers of a tiny model."""
    save_tiny(model_type, folder / "model")
    wanted = options(folder / "model", 3, ids=IDS, method=MethodOptions(preset=Preset.HC_SMOE, refit=refit))
    return [layer.refit for layer in convert(folder / "model", wanted).layers if layer.refit is not None]


@pytest.mark.parametrize("model_type", ["gpt_oss", "nemotron_h", "dbrx", "gemma4_text", "zaya", "deepseek_v3"])
def test_every_kind_of_expert_is_refitted_by_least_squares(tmp_path: Path, model_type: str) -> None:
    found = refits(tmp_path, model_type, Refit.DOWN)
    # The layer of DBRX has random weights that least squares cannot improve on text it has not seen.
    assert any(refit.is_kept for refit in found) or model_type == "dbrx"
    assert all(refit.error_after < refit.error_before for refit in found if refit.is_kept)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_the_blocks_of_every_architecture_are_refitted(tmp_path: Path, model_type: str) -> None:
    found = refits(tmp_path, model_type, Refit.BLOCK)
    assert any(refit.steps for refit in found)
    assert all(refit.error_after < refit.error_before for refit in found if refit.is_kept)


def test_experts_whose_input_is_scaled_are_not_refitted_by_least_squares(tmp_path: Path) -> None:
    save_tiny("llama4_text", tmp_path / "model")
    wanted = options(tmp_path / "model", 3, method=MethodOptions(preset=Preset.HC_SMOE, refit=Refit.DOWN))
    error = refuse(tmp_path / "model", PlanError, wanted)
    assert error.message.startswith("`refit='down'` fits sums of router weight times neuron, but in ")
    assert error.message.endswith("the weight is applied before an expert's first projection.")
    assert error.hint == "use `refit='block'` or `refit='none'`"
