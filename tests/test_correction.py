"""Corrections bring a reduced layer nearer to the original one, and are judged on text that they have not seen."""

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
from hcsmoe_hub.correction import blocks, experts
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.merging import fit_experts
from hcsmoe_hub.options import Correct, Layout, Method, MethodOptions
from hcsmoe_hub.report import ConversionReport, CorrectionReport

IDS = token_ids(32, 32)
STEPS = 25
FITTED = [Correct.DOWN, Correct.EXPERTS, Correct.BLOCKS]


@dataclass(frozen=True)
class Conversion:
    """What a conversion left."""

    report: ConversionReport
    tensors: Mapping[str, Tensor]

    @property
    def corrections(self) -> list[CorrectionReport]:
        """One per layer."""
        found = [layer.correction for layer in self.report.layers if layer.correction is not None]
        assert len(found) == len(self.report.layers)
        return found


class Model:
    """A tiny Mixtral, and its conversions to four experts."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = build(folder / "model", **settings)
        self.converted = cache(lambda correct, method=Method.MERGE: self.convert(correct, method))

    def convert(self, correct: Correct, method: Method = Method.MERGE, **others: Any) -> Conversion:
        wanted = MethodOptions(method=method, correct=correct, **others)
        report = convert(self.folder, options(self.folder, 4, ids=IDS, method=wanted, overwrite=True))
        return Conversion(report, read_tensors(self.folder.parent / "result"))


@pytest.fixture(scope="module", autouse=True)
def _few_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "STEPS", STEPS)
        patch.setattr(fit_experts, "ROUNDS", 3)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("mixtral"))


# What a correction does


@pytest.mark.parametrize("correct", FITTED)
@pytest.mark.parametrize("method", Method)
def test_every_layer_comes_nearer_to_the_original_one(model: Model, method: Method, correct: Correct) -> None:
    plain, corrected = model.converted(Correct.NONE, method), model.converted(correct, method)
    for before, after, correction in zip(
        plain.report.layers, corrected.report.layers, corrected.corrections, strict=True
    ):
        assert after.labels == before.labels
        assert before.correction is None
        assert correction.is_kept
        assert correction.error_after < correction.error_before
        assert after.output_error < before.output_error
        assert correction.fitted_tokens + correction.held_out_tokens == IDS.numel()


@pytest.mark.parametrize("method", Method)
def test_whole_experts_come_nearer_than_down_projections_alone(model: Model, method: Method) -> None:
    down, whole = (model.converted(correct, method).corrections for correct in (Correct.DOWN, Correct.EXPERTS))
    for one, other in zip(down, whole, strict=True):
        assert (one.error_before, one.rounds, one.steps) == (other.error_before, 1, 0)
        assert other.error_after < one.error_after
        assert 1 < other.rounds <= 1 + fit_experts.ROUNDS
        assert other.steps == 0


@pytest.mark.parametrize("method", Method)
def test_blocks_come_nearer_than_experts_or_stay_what_these_are(model: Model, method: Method) -> None:
    whole, block = (model.converted(correct, method).corrections for correct in (Correct.EXPERTS, Correct.BLOCKS))
    assert any(correction.steps for correction in block)
    # A layer further on sees the same inputs, as nothing is propagated.
    for one, other in zip(whole, block, strict=True):
        assert other == one or (other.steps == STEPS and other.error_after < one.error_after)
        assert replace(other, steps=0, error_after=one.error_after) == one


def test_nothing_but_what_is_fitted_changes(model: Model) -> None:
    plain = model.converted(Correct.NONE).tensors
    routers = [
        f"model.layers.{layer}.block_sparse_moe.gate.weight"
        for layer, correction in enumerate(model.converted(Correct.BLOCKS).corrections)
        if correction.steps
    ]
    down, whole = (tuple(f"{matrix}.weight" for matrix in names) for names in (("w2",), ("w1", "w2", "w3")))
    ends = {Correct.DOWN: down, Correct.EXPERTS: whole, Correct.BLOCKS: (*whole, *routers)}
    assert routers
    for correct in FITTED:
        changed = differing(model.converted(correct).tensors, plain)
        assert changed == sorted(name for name in plain if name.endswith(ends[correct]))


@pytest.mark.parametrize("correct", FITTED)
def test_the_seed_gives_the_same_result_again(model: Model, correct: Correct) -> None:
    once, again = model.converted(correct), model.convert(correct)
    assert again.corrections == once.corrections
    assert differing(again.tensors, once.tensors) == []


def test_a_source_of_half_precision_is_corrected_in_its_dtype(tmp_path: Path) -> None:
    model = Model(tmp_path, dtype=torch.bfloat16)
    plain, corrected = model.convert(Correct.NONE), model.convert(Correct.BLOCKS)
    assert all(tensor.dtype == torch.bfloat16 for tensor in corrected.tensors.values())
    for before, after in zip(plain.report.layers, corrected.report.layers, strict=True):
        assert after.output_error < before.output_error


# What is dropped


def _worse(sample: object, wanted_TH: Tensor, down_CIH: Tensor, **_: Any) -> Tensor:
    return 10 * down_CIH.float()


def _worse_each_time(sample: object, wanted_TH: Tensor, down_CIH: Tensor, *, seed: int) -> Iterator[int]:
    for number in (1, 2, 3):
        down_CIH *= 10
        yield number


@pytest.mark.parametrize("correct", [Correct.DOWN, Correct.EXPERTS])
def test_a_correction_that_does_not_help_on_held_out_text_is_dropped(
    model: Model, correct: Correct, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "fit_down", _worse)
    monkeypatch.setattr(experts, "fit_experts", _worse_each_time)
    found = model.convert(correct)
    assert all(not correction.is_kept and correction.rounds == 0 for correction in found.corrections)
    assert all(correction.error_after == correction.error_before for correction in found.corrections)
    assert differing(found.tensors, model.converted(Correct.NONE).tensors) == []


def test_the_best_round_is_kept(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "fit_experts", _worse_each_time)
    found = model.convert(Correct.EXPERTS)
    assert found.corrections == model.converted(Correct.DOWN).corrections
    assert differing(found.tensors, model.converted(Correct.DOWN).tensors) == []


def test_a_descent_that_does_not_help_on_held_out_text_is_dropped(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "RATE", 10.0)
    found = model.convert(Correct.BLOCKS)
    assert found.corrections == model.converted(Correct.EXPERTS).corrections
    assert differing(found.tensors, model.converted(Correct.EXPERTS).tensors) == []


def test_a_descent_may_help_where_least_squares_did_not(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "fit_down", _worse)
    monkeypatch.setattr(experts, "fit_experts", _worse_each_time)
    found = model.convert(Correct.BLOCKS)
    assert all(
        (correction.is_kept, correction.rounds, correction.steps) == (True, 0, STEPS)
        for correction in found.corrections
    )


@pytest.mark.parametrize("correct", FITTED)
def test_a_layer_that_keeps_its_experts_is_not_corrected(model: Model, correct: Correct) -> None:
    wanted = options(model.folder, 8, method=MethodOptions(correct=correct), overwrite=True)
    assert all(layer.correction is None and layer.output_error == 0 for layer in convert(model.folder, wanted).layers)


# What is refused


@pytest.mark.parametrize("correct", FITTED)
@pytest.mark.parametrize("layout", [Layout.MAPPED, Layout.FULL])
def test_layouts_of_the_papers_are_not_corrected(tmp_path: Path, layout: Layout, correct: Correct) -> None:
    source = build(tmp_path / "model")
    error = refuse(source, PlanError, options(source, 4, method=MethodOptions(correct=correct, layout=layout)))
    assert f"--correct {correct} would have no effect: the {layout} layout keeps to the papers" in error.message
