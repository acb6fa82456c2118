"""Refits bring a reduced layer nearer to the original one, and are judged on text that they have not seen."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
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
from hcsmoe_hub.layer import refit_down as least_squares
from hcsmoe_hub.methods.refit import descent
from hcsmoe_hub.methods.refit.guard import Verdict
from hcsmoe_hub.methods.refit.held_out import Split, split_tokens
from hcsmoe_hub.options import Layout, Method, MethodOptions, Preset, Refit
from hcsmoe_hub.report import ConversionReport, RefitReport

IDS = token_ids(32, 32)
STEPS = 32
FITTED = [Refit.DOWN, Refit.BLOCK]


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
def test_blocks_come_nearer_than_down_projections_alone(model: TinyModel, method: Method) -> None:
    # Text this short takes some passes.
    down, block = model.converted(Refit.DOWN, method).refits, model.convert(Refit.BLOCK, method, refit_passes=8).refits
    for one, other in zip(down, block, strict=True):
        assert math.isclose(one.error_before, other.error_before, rel_tol=1e-3)
        assert (one.rounds, one.steps) == (1, 0)
        assert other.rounds == 0
        assert 0 < other.steps <= 8 * STEPS
    assert sum(refit.error_after for refit in block) < sum(refit.error_after for refit in down)


def test_more_passes_are_more_steps_and_a_smaller_error(model: TinyModel) -> None:
    once, twice = (model.convert(Refit.BLOCK, refit_passes=passes).refits for passes in (1, 3))
    assert [refit.steps for refit in once] == [STEPS] * len(once)
    assert [refit.steps for refit in twice] == [3 * STEPS] * len(twice)
    assert all(more.error_after < less.error_after for less, more in zip(once, twice, strict=True))


def test_nothing_but_what_is_fitted_changes(model: TinyModel) -> None:
    plain = model.converted(Refit.NONE).tensors
    ends = {Refit.DOWN: ("w2.weight",), Refit.BLOCK: ("w1.weight", "w2.weight", "w3.weight", "moe.gate.weight")}
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
    plain, refitted = model.convert(Refit.NONE), model.convert(Refit.BLOCK)
    assert all(tensor.dtype == torch.bfloat16 for tensor in refitted.tensors.values())
    for before, after in zip(plain.report.layers, refitted.report.layers, strict=True):
        assert after.output_error < before.output_error


def test_a_step_that_does_not_fit_into_memory_is_computed_in_pieces(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, loss, most = model.converted(Refit.BLOCK), blocks._Fit.loss, 10
    seen: list[int] = []

    def scarce(fit: blocks._Fit, tokens: Tensor, count: int) -> Tensor:
        if len(tokens) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        seen.append(len(tokens))
        return loss(fit, tokens, count)

    monkeypatch.setattr(blocks._Fit, "loss", scarce)
    monkeypatch.setattr(blocks, "LEAST_TOKENS", 1)
    found = model.convert(Refit.BLOCK)
    assert max(seen) <= most
    assert [layer.labels for layer in found.report.layers] == [layer.labels for layer in expected.report.layers]
    for one, other in zip(found.refits, expected.refits, strict=True):
        assert math.isclose(one.error_after, other.error_after, rel_tol=1e-2)


# What is dropped


def _worse(sample: object, wanted_TH: Tensor, down_CIH: Tensor, **_: Any) -> Tensor:
    return 10 * down_CIH.float()


def test_least_squares_that_do_not_help_on_held_out_text_are_dropped(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(least_squares, "fit_down", _worse)
    assert_dropped(model, model.convert(Refit.DOWN))


def test_a_descent_that_does_not_help_on_held_out_text_is_dropped(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descent, "RATE", 1e4)
    monkeypatch.setattr(blocks, "corrected", lambda change: 1.0)
    assert_dropped(model, model.convert(Refit.BLOCK))


def assert_dropped(model: TinyModel, found: Conversion) -> None:
    for refit in found.refits:
        assert (refit.is_kept, refit.rounds, refit.steps, refit.strength) == (False, 0, 0, None)
        assert refit.error_after == refit.error_before
    assert differing(found.tensors, model.converted(Refit.NONE).tensors) == []


@pytest.mark.parametrize(("refit", "module"), [(Refit.DOWN, least_squares), (Refit.BLOCK, blocks)])
def test_a_fit_that_hurts_one_domain_is_dropped(
    model: TinyModel, refit: Refit, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second half of the text is another domain, and all that the fit is to learn there is wrong.
    monkeypatch.setattr(module, "split_tokens", _split_in_two)
    monkeypatch.setattr(Verdict, "worst", _worst_of_two)
    assert_dropped(model, model.convert(refit))


def _split_in_two(tokens: int, _domains: object) -> Split:
    return split_tokens(tokens, ["kind", "hostile"])


def _worst_of_two(after: Verdict, before: Verdict) -> float:
    """As if every change made the hostile domain a little worse."""
    assert set(after.domains) == {"kind", "hostile"}
    return 1.0 if after == before else 1.01


def test_domains_are_reported(tmp_path: Path) -> None:
    model = TinyModel(tmp_path)
    for refit in FITTED:
        for found in model.convert(refit).refits:
            assert found.domains == {} or all(error["after"] < error["before"] for error in found.domains.values())


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
