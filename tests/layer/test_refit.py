"""Refits bring a reduced layer nearer to the original one, and are judged on text that they have not seen."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, differing, options, read_tensors, refuse, token_ids
from torch import Tensor

from hcsmoe_hub import convert
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.layer import refit_block as blocks
from hcsmoe_hub.layer import refit_experts as experts
from hcsmoe_hub.methods.refit import experts as fit_experts
from hcsmoe_hub.options import Layout, Method, MethodOptions, Preset, Refit
from hcsmoe_hub.report import ConversionReport, RefitReport

IDS = token_ids(32, 32)
STEPS = 25
FITTED = [Refit.DOWN, Refit.EXPERTS, Refit.BLOCKS]


@dataclass(frozen=True)
class Conversion:
    """What a conversion left."""

    report: ConversionReport
    tensors: Mapping[str, Tensor]

    @property
    def refits(self) -> list[RefitReport]:
        """One per layer."""
        found = [layer.refit for layer in self.report.layers if layer.refit is not None]
        assert len(found) == len(self.report.layers)
        return found


class TinyModel:
    """A tiny Mixtral, and its conversions to four experts."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = build(folder / "model", **settings)
        self.converted = cache(lambda refit, method=Method.MERGE: self.convert(refit, method))

    def convert(self, refit: Refit, method: Method = Method.MERGE, **others: Any) -> Conversion:
        wanted = MethodOptions(preset=Preset.HC_SMOE, method=method, refit=refit, **others)
        report = convert(self.folder, options(self.folder, 4, ids=IDS, method=wanted, overwrite=True))
        return Conversion(report, read_tensors(self.folder.parent / "result"))


@pytest.fixture(scope="module", autouse=True)
def _few_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_STEPS", STEPS)
        patch.setattr(fit_experts, "ROUNDS", 3)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(tmp_path_factory.mktemp("mixtral"))


# What a refit does


@pytest.mark.parametrize("refit", FITTED)
@pytest.mark.parametrize("method", Method)
def test_every_layer_comes_nearer_to_the_original_one(model: TinyModel, method: Method, refit: Refit) -> None:
    plain, refitted = model.converted(Refit.NONE, method), model.converted(refit, method)
    for before, after, refit in zip(plain.report.layers, refitted.report.layers, refitted.refits, strict=True):
        assert after.labels == before.labels
        assert before.refit is None
        assert refit.is_kept
        assert refit.error_after < refit.error_before
        assert after.output_error < before.output_error
        assert refit.fitted_tokens + refit.held_out_tokens == IDS.numel()


@pytest.mark.parametrize("method", Method)
def test_whole_experts_come_nearer_than_down_projections_alone(model: TinyModel, method: Method) -> None:
    down, whole = (model.converted(refit, method).refits for refit in (Refit.DOWN, Refit.EXPERTS))
    for one, other in zip(down, whole, strict=True):
        assert (one.error_before, one.rounds, one.steps) == (other.error_before, 1, 0)
        assert other.error_after < one.error_after
        assert 1 < other.rounds <= 1 + fit_experts.ROUNDS
        assert other.steps == 0


@pytest.mark.parametrize("method", Method)
def test_blocks_come_nearer_than_experts_or_stay_what_these_are(model: TinyModel, method: Method) -> None:
    whole, block = (model.converted(refit, method).refits for refit in (Refit.EXPERTS, Refit.BLOCKS))
    assert any(refit.steps for refit in block)
    # A layer further on sees the same inputs, as nothing is propagated.
    for one, other in zip(whole, block, strict=True):
        assert other == one or (other.steps == STEPS and other.error_after < one.error_after)
        assert replace(other, steps=0, error_after=one.error_after) == one


def test_nothing_but_what_is_fitted_changes(model: TinyModel) -> None:
    plain = model.converted(Refit.NONE).tensors
    routers = [
        f"model.layers.{layer}.block_sparse_moe.gate.weight"
        for layer, refit in enumerate(model.converted(Refit.BLOCKS).refits)
        if refit.steps
    ]
    down, whole = (tuple(f"{matrix}.weight" for matrix in names) for names in (("w2",), ("w1", "w2", "w3")))
    ends = {Refit.DOWN: down, Refit.EXPERTS: whole, Refit.BLOCKS: (*whole, *routers)}
    assert routers
    for refit in FITTED:
        changed = differing(model.converted(refit).tensors, plain)
        assert changed == sorted(name for name in plain if name.endswith(ends[refit]))


@pytest.mark.parametrize("refit", FITTED)
def test_the_seed_gives_the_same_result_again(model: TinyModel, refit: Refit) -> None:
    once, again = model.converted(refit), model.convert(refit)
    assert again.refits == once.refits
    assert differing(again.tensors, once.tensors) == []


def test_a_source_of_half_precision_is_corrected_in_its_dtype(tmp_path: Path) -> None:
    model = TinyModel(tmp_path, dtype=torch.bfloat16)
    plain, refitted = model.convert(Refit.NONE), model.convert(Refit.BLOCKS)
    assert all(tensor.dtype == torch.bfloat16 for tensor in refitted.tensors.values())
    for before, after in zip(plain.report.layers, refitted.report.layers, strict=True):
        assert after.output_error < before.output_error


# What is dropped


def _worse(sample: object, wanted_TH: Tensor, down_CIH: Tensor, **_: Any) -> Tensor:
    return 10 * down_CIH.float()


def _worse_each_time(sample: object, wanted_TH: Tensor, down_CIH: Tensor, *, seed: int) -> Iterator[int]:
    for number in (1, 2, 3):
        down_CIH *= 10
        yield number


@pytest.mark.parametrize("refit", [Refit.DOWN, Refit.EXPERTS])
def test_a_correction_that_does_not_help_on_held_out_text_is_dropped(
    model: TinyModel, refit: Refit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "fit_down", _worse)
    monkeypatch.setattr(experts, "fit_experts", _worse_each_time)
    found = model.convert(refit)
    assert all(not refit.is_kept and refit.rounds == 0 for refit in found.refits)
    assert all(refit.error_after == refit.error_before for refit in found.refits)
    assert differing(found.tensors, model.converted(Refit.NONE).tensors) == []


def test_the_best_round_is_kept(model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "fit_experts", _worse_each_time)
    found = model.convert(Refit.EXPERTS)
    assert found.refits == model.converted(Refit.DOWN).refits
    assert differing(found.tensors, model.converted(Refit.DOWN).tensors) == []


def test_a_descent_that_does_not_help_on_held_out_text_is_dropped(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "RATE", 10.0)
    found = model.convert(Refit.BLOCKS)
    assert found.refits == model.converted(Refit.EXPERTS).refits
    assert differing(found.tensors, model.converted(Refit.EXPERTS).tensors) == []


def test_a_descent_may_help_where_least_squares_did_not(model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "fit_down", _worse)
    monkeypatch.setattr(experts, "fit_experts", _worse_each_time)
    found = model.convert(Refit.BLOCKS)
    assert all((refit.is_kept, refit.rounds, refit.steps) == (True, 0, STEPS) for refit in found.refits)


@pytest.mark.parametrize("refit", FITTED)
def test_a_layer_that_keeps_its_experts_is_not_corrected(model: TinyModel, refit: Refit) -> None:
    wanted = options(model.folder, 8, method=MethodOptions(preset=Preset.HC_SMOE, refit=refit), overwrite=True)
    assert all(layer.refit is None and layer.output_error == 0 for layer in convert(model.folder, wanted).layers)


# What is refused


@pytest.mark.parametrize("refit", FITTED)
@pytest.mark.parametrize("layout", [Layout.MAPPED, Layout.FULL])
def test_layouts_of_the_papers_are_not_refitted(tmp_path: Path, layout: Layout, refit: Refit) -> None:
    source = build(tmp_path / "model")
    error = refuse(
        source, PlanError, options(source, 4, method=MethodOptions(preset=Preset.HC_SMOE, refit=refit, layout=layout))
    )
    assert f"`refit='{refit}'` would have no effect: the {layout} layout keeps to the papers" in error.message
