"""Every kind of expert is corrected, or refused with what it does otherwise."""

from pathlib import Path

import pytest
from architectures import save_tiny
from tiny_models import options, refuse, token_ids

from hcsmoe_hub import convert
from hcsmoe_hub.correction import blocks
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.merging import fit_experts
from hcsmoe_hub.options import Correct, MethodOptions
from hcsmoe_hub.report import CorrectionReport

IDS = token_ids(16, 32)


def corrections(folder: Path, model_type: str, correct: Correct) -> list[CorrectionReport]:
    """What a correction did to the layers of a tiny model."""
    save_tiny(model_type, folder / "model")
    wanted = options(folder / "model", 3, ids=IDS, method=MethodOptions(correct=correct))
    return [layer.correction for layer in convert(folder / "model", wanted).layers if layer.correction is not None]


@pytest.mark.parametrize("model_type", ["gpt_oss", "nemotron_h", "dbrx", "gemma4_text", "zaya", "deepseek_v3"])
def test_every_kind_of_expert_is_corrected(tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_experts, "ROUNDS", 2)
    found = corrections(tmp_path, model_type, Correct.EXPERTS)
    assert max(correction.rounds for correction in found) > 1
    assert all(correction.error_after < correction.error_before for correction in found if correction.is_kept)


# Biases, a correction bias beside the router, and a table that leads two choices of a token to one merged expert.
@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v3", "deepseek_v4"])
def test_every_kind_of_block_is_reconstructed(tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_experts, "ROUNDS", 1)
    monkeypatch.setattr(blocks, "STEPS", 10)
    # Small enough to help a layer of random weights, whatever its kind.
    monkeypatch.setattr(blocks, "RATE", 0.002)
    found = corrections(tmp_path, model_type, Correct.BLOCKS)
    assert any(correction.steps for correction in found)
    assert all(correction.error_after < correction.error_before for correction in found)


@pytest.mark.parametrize("correct", [Correct.DOWN, Correct.EXPERTS, Correct.BLOCKS])
def test_experts_whose_input_is_scaled_are_refused(tmp_path: Path, correct: Correct) -> None:
    save_tiny("llama4_text", tmp_path / "model")
    wanted = options(tmp_path / "model", 3, method=MethodOptions(correct=correct))
    error = refuse(tmp_path / "model", PlanError, wanted)
    assert error.message.startswith(f"--correct {correct} fits sums of router weight times neuron, but in ")
    assert error.message.endswith("the weight is applied before an expert's first projection.")
    assert error.hint == "use --correct none"


def test_blocks_that_are_the_layer_itself_are_refused_where_they_would_run_on_single_tokens(tmp_path: Path) -> None:
    save_tiny("gemma4_text", tmp_path / "model")
    wanted = options(tmp_path / "model", 3, method=MethodOptions(correct=Correct.BLOCKS))
    error = refuse(tmp_path / "model", PlanError, wanted)
    assert error.message.startswith("--correct blocks runs the MoE block of a layer again on single tokens, but in ")
    assert error.hint == "leave --correct out"
