"""Fitted rows bring the reduced router nearer to the full one, are judged on text they have not seen, and refuse."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import save_tiny
from tiny_models import build, options, read_tensors, refuse, token_ids
from torch import Tensor

import hcsmoe_hub.layer.router_fit
import hcsmoe_hub.planning.refusals
from hcsmoe_hub import convert
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.methods.routing import fit_rows
from hcsmoe_hub.options import Clustering, Method, MethodOptions, Preset, Refit, RouterPolicy
from hcsmoe_hub.report import ConversionReport

FIT = MethodOptions(preset=Preset.HC_SMOE, router=RouterPolicy.FIT)
IDS = token_ids(64, 32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build(tmp_path / "model")


def converted(source: Path, method: MethodOptions, experts: int = 4, **others: Any) -> ConversionReport:
    return convert(source, options(source, experts, ids=IDS, method=method, overwrite=True, **others))


@pytest.mark.parametrize("clustering", [None, Clustering.FUZZY, Clustering.RANDOM])
def test_fitted_layers_choose_more_as_the_full_router_does(source: Path, clustering: Clustering | None) -> None:
    plain = converted(source, MethodOptions(preset=Preset.HC_SMOE, clustering=clustering))
    fitted = converted(source, replace(FIT, clustering=clustering))
    for before, after in zip(plain.layers, fitted.layers, strict=True):
        assert (before.router.is_fitted, before.router.top_k_agreement_before) == (None, None)
        assert after.labels == before.labels
        assert after.router.policy == "fit"
        assert after.router.top_k_agreement_before == before.router.top_k_agreement
        gain = after.router.top_k_agreement - before.router.top_k_agreement
        assert gain > 0 if after.router.is_fitted else gain == 0
    assert any(layer.router.is_fitted for layer in fitted.layers)


def test_only_router_rows_change(source: Path) -> None:
    result = source.parent / "result"
    converted(source, MethodOptions(preset=Preset.HC_SMOE))
    plain = read_tensors(result)
    fitted = {layer.layer for layer in converted(source, FIT).layers if layer.router.is_fitted}
    changed = {name for name, tensor in read_tensors(result).items() if not torch.equal(plain[name], tensor)}
    assert changed == {f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in fitted} != set()


@pytest.mark.parametrize(("model_type", "expected"), [("gpt_oss", {"weight", "bias"}), ("minimax_m2", {"weight"})])
def test_a_bias_of_the_logits_is_fitted_too_and_a_correction_bias_stays(
    tmp_path: Path, model_type: str, expected: set[str]
) -> None:
    source, result = tmp_path / "model", tmp_path / "result"
    save_tiny(model_type, source)
    converted(source, MethodOptions(preset=Preset.HC_SMOE), 3)
    plain = read_tensors(result)
    assert any(name.endswith("bias") for name in plain)
    report = converted(source, FIT, 3)
    changed = {name for name, tensor in read_tensors(result).items() if not torch.equal(plain[name], tensor)}
    assert {name.rpartition(".")[2] for name in changed} == expected
    assert len(changed) == len(expected) * sum(bool(layer.router.is_fitted) for layer in report.layers)


def test_the_same_conversion_gives_the_same_bytes(source: Path) -> None:
    found = []
    for _ in range(2):
        converted(source, FIT)
        found.append(read_tensors(source.parent / "result"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("method", Method)
def test_a_fit_that_does_not_help_on_held_out_text_is_dropped(
    source: Path, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(inputs_TH: Tensor, targets_TC: Tensor, rows_CH: Tensor, bias_C: Tensor | None, **_: object) -> object:
        return -rows_CH.float(), bias_C

    plain = converted(source, MethodOptions(preset=Preset.HC_SMOE, method=method))
    before = read_tensors(source.parent / "result")
    monkeypatch.setattr(hcsmoe_hub.layer.router_fit, "fit_rows", worse)
    report = converted(source, replace(FIT, method=method))
    for layer, other in zip(report.layers, plain.layers, strict=True):
        assert layer.router.is_fitted is False
        assert layer.router.top_k_agreement_before == layer.router.top_k_agreement == other.router.top_k_agreement
    assert all(torch.equal(before[name], tensor) for name, tensor in read_tensors(source.parent / "result").items())


def test_the_last_tokens_are_not_fitted_to_and_many_are_thinned_evenly(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def counting(inputs_TH: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        seen.append(len(inputs_TH))
        return fit_rows(inputs_TH, *args, **kwargs)

    monkeypatch.setattr(hcsmoe_hub.layer.router_fit, "fit_rows", counting)
    converted(source, FIT)
    monkeypatch.setattr(hcsmoe_hub.layer.router_fit, "ROUTER_TOKENS", 100)
    converted(source, FIT)
    assert seen == [IDS.numel() * 7 // 8] * 2 + [100] * 2


def test_where_all_experts_stay_nothing_is_fitted(source: Path) -> None:
    routers = [layer.router for layer in converted(source, FIT, 8).layers]
    assert all((router.is_fitted, router.top_k_agreement_before) == (False, None) for router in routers)
    before, after = read_tensors(source), read_tensors(source.parent / "result")
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_a_router_without_a_matrix_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hcsmoe_hub.planning.refusals, "router_weight", lambda block, state: None)
    error = refuse(source, PlanError, options(source, 4, method=FIT))
    assert error.message.startswith("`router='fit'` needs a router with one row per expert, which layer 0 of")


def test_a_table_chooses_as_it_did_and_the_other_layers_are_fitted(tmp_path: Path) -> None:
    save_tiny("deepseek_v4", tmp_path / "model")
    report = converted(tmp_path / "model", FIT, 3)
    assert [layer.router.top_k_agreement_before is None for layer in report.layers] == [True, True, True, False]
    assert [layer.router.is_fitted for layer in report.layers] == [False, False, False, True]


def test_the_correction_follows_the_fitted_router(source: Path) -> None:
    plain = converted(source, replace(FIT, refit=Refit.NONE))
    refitted = converted(source, replace(FIT, refit=Refit.DOWN))
    for before, after in zip(plain.layers, refitted.layers, strict=True):
        assert after.router == before.router
        assert after.output_error < before.output_error


def test_a_statistics_file_is_enough(source: Path) -> None:
    statistics = source.parent / "statistics"
    direct = converted(source, FIT, statistics=statistics)
    reused = converted(source, FIT, statistics=statistics)
    assert [layer.router for layer in reused.layers] == [layer.router for layer in direct.layers]


@pytest.mark.parametrize("model_type", ["gemma4_text", "llama4_text", "zaya", "dbrx", "deepseek_v2"])
def test_every_kind_of_router_can_be_fitted(tmp_path: Path, model_type: str) -> None:
    save_tiny(model_type, tmp_path / "model")
    for layer in converted(tmp_path / "model", FIT, 3).layers:
        assert layer.router.top_k_agreement_before is not None
        assert layer.router.top_k_agreement >= layer.router.top_k_agreement_before
