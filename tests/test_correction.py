"""The correction brings a reduced layer nearer to the original one, is judged on text it has not seen, and refuses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import save_tiny
from tiny_models import build, options, read_tensors, refuse, token_ids
from torch import Tensor

import hcsmoe_hub.correction
from hcsmoe_hub import convert
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.options import Correct, Layout, Method, MethodOptions

CORRECTED = MethodOptions(correct=Correct.DOWN)
IDS = token_ids(32, 32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build(tmp_path / "model")


@pytest.mark.parametrize("method", [Method.MERGE, Method.PRUNE])
def test_every_layer_comes_nearer_to_the_original_one(source: Path, method: Method) -> None:
    plain = convert(source, options(source, 4, ids=IDS, method=MethodOptions(method=method)))
    wanted = replace(CORRECTED, method=method)
    corrected = convert(source, options(source, 4, ids=IDS, method=wanted, overwrite=True))
    for before, after in zip(plain.layers, corrected.layers, strict=True):
        assert after.labels == before.labels
        assert before.correction is None
        assert after.correction is not None
        assert after.correction.is_kept
        assert after.correction.error_after < after.correction.error_before
        assert after.output_error < before.output_error
        assert after.correction.fitted_tokens + after.correction.held_out_tokens == IDS.numel()


def test_only_down_projections_change(source: Path) -> None:
    result = source.parent / "result"
    convert(source, options(source, 4, ids=IDS))
    plain = read_tensors(result)
    convert(source, options(source, 4, ids=IDS, method=CORRECTED, overwrite=True))
    corrected = read_tensors(result)
    changed = {name for name in plain if not torch.equal(plain[name], corrected[name])}
    assert changed == {name for name in plain if name.endswith("w2.weight")}


def test_a_correction_that_does_not_help_on_held_out_text_is_dropped(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(sample: object, residual_TH: Tensor, down_CIH: Tensor) -> Tensor:
        return 10 * down_CIH.float()

    result = source.parent / "result"
    convert(source, options(source, 4, ids=IDS))
    plain = read_tensors(result)
    monkeypatch.setattr(hcsmoe_hub.correction, "fit_down", worse)
    report = convert(source, options(source, 4, ids=IDS, method=CORRECTED, overwrite=True))
    assert all(layer.correction is not None and not layer.correction.is_kept for layer in report.layers)
    assert all(torch.equal(plain[name], tensor) for name, tensor in read_tensors(result).items())


def test_a_layer_that_keeps_its_experts_is_not_corrected(source: Path) -> None:
    report = convert(source, options(source, 8, method=CORRECTED))
    assert all(layer.correction is None and layer.output_error == 0 for layer in report.layers)


@pytest.mark.parametrize("layout", [Layout.MAPPED, Layout.FULL])
def test_layouts_of_the_papers_are_not_corrected(source: Path, layout: Layout) -> None:
    error = refuse(source, PlanError, options(source, 4, method=replace(CORRECTED, layout=layout)))
    assert f"--correct down would have no effect: the {layout} layout keeps to the papers" in error.message


def test_experts_whose_input_is_scaled_are_refused(tmp_path: Path) -> None:
    save_tiny("llama4_text", tmp_path / "model")
    error = refuse(tmp_path / "model", PlanError, options(tmp_path / "model", 3, method=CORRECTED))
    assert "the weight is applied before an expert's first projection" in error.message


@pytest.mark.parametrize("model_type", ["gpt_oss", "nemotron_h", "dbrx", "gemma4_text", "zaya", "deepseek_v3"])
def test_every_kind_of_expert_is_corrected(tmp_path: Path, model_type: str) -> None:
    save_tiny(model_type, tmp_path / "model")
    report = convert(tmp_path / "model", options(tmp_path / "model", 3, ids=IDS, method=CORRECTED))
    kept = [layer.correction for layer in report.layers if layer.correction is not None and layer.correction.is_kept]
    assert kept
    assert all(correction.error_after < correction.error_before for correction in kept)
