"""Pruning from end to end: the best experts stay as they are, with their router rows, the others are removed."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import build, differing, options, read_config, read_tensors, refuse, same_bits, token_ids
from transformers import AutoModelForCausalLM

from hcsmoe_hub import MethodOptions, convert
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.methods.pruning import DroppedEnergy, ScaledResidual
from hcsmoe_hub.observation.statistics_file import StatisticsFile
from hcsmoe_hub.options import Preset, Saliency
from hcsmoe_hub.report import ConversionReport, LayerReport

EXPERTS = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"
MATRICES = ("w1", "w2", "w3")
SCORES = {Saliency.FREQUENCY: "usage", Saliency.ROUTING_SCORE: "routing_score", Saliency.REAP: "saliency"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Mixtral: 2 layers, 8 experts, 2 per token."""
    return build(tmp_path / "model")


def prune(source: Path, experts: int, saliency: Saliency | None = None, **others: Any) -> ConversionReport:
    """Prunes to ``result`` next to the source."""
    method = MethodOptions(preset=Preset.REAP, saliency=saliency, **others)
    return convert(source, options(source, experts, method=method, overwrite=True))


def kept(layer: LayerReport) -> list[int]:
    """Experts that a layer has left, ascending."""
    return [expert for expert, label in enumerate(layer.labels) if label != -1]


@pytest.mark.parametrize(
    ("model_type", "saliency"),
    [*(("mixtral", saliency) for saliency in Saliency), ("deepseek_v3", Saliency.REAP)],
)
def test_kept_experts_and_their_router_rows_keep_their_bits(
    tmp_path: Path, model_type: str, saliency: Saliency
) -> None:
    source = build(tmp_path / "model", model_type, dtype=torch.bfloat16, as_published=False)
    report = prune(source, 4, saliency)
    before, after = read_tensors(source), read_tensors(tmp_path / "result")
    for layer in report.layers:
        rows = kept(layer)
        assert layer.labels == [rows.index(expert) if expert in rows else -1 for expert in range(8)]
        assert (layer.dominant, layer.experts, layer.merge_heights, layer.tree) == (rows, 4, [], None)
        assert layer.router.policy == "kept rows"
        sized = [name for name in before if f"layers.{layer.layer}." in name and before[name].shape[:1] == (8,)]
        # Experts, router, and where there is one the correction bias.
        assert len(sized) >= 3
        assert [name for name in sized if not same_bits(after[name], before[name][rows])] == []
    others = {name for name in before if before[name].shape == after[name].shape}
    assert [name for name in others if not same_bits(after[name], before[name])] == []


@pytest.mark.parametrize("saliency", SCORES)
def test_the_experts_with_the_highest_scores_stay(source: Path, saliency: Saliency) -> None:
    for layer in prune(source, 3, saliency).layers:
        scores = getattr(layer, SCORES[saliency])
        assert kept(layer) == sorted(sorted(range(8), key=lambda expert: -scores[expert])[:3])


def test_the_scores_distinguish_the_choices(source: Path) -> None:
    choices = {saliency: [kept(layer) for layer in prune(source, 5, saliency).layers] for saliency in SCORES}
    assert len({str(choice) for choice in choices.values()}) == len(SCORES)


def test_protected_experts_stay(source: Path) -> None:
    first = [kept(layer) for layer in prune(source, 3).layers]
    dropped = [next(expert for expert in range(8) if expert not in rows) for rows in first]
    report = prune(source, 3, protect=((0, dropped[0]),))
    assert dropped[0] in kept(report.layers[0])
    assert len(kept(report.layers[0])) == 3
    assert kept(report.layers[1]) == first[1]


def test_a_pruned_result_loads_and_chooses_among_what_is_left(source: Path, tmp_path: Path) -> None:
    report = prune(source, 4)
    assert report.method["saliency"] == "reap"
    assert report.method["merge"] is None
    assert read_config(tmp_path / "result")["num_local_experts"] == 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "result")
    with torch.no_grad():
        assert model(token_ids()).logits.isfinite().all()
    for layer in report.layers:
        assert layer.output_error > 0
        assert 0 < layer.router.top_k_agreement < 1
        assert (layer.silhouette, layer.dunn) == (None, None)


@pytest.mark.parametrize("saliency", Saliency)
def test_pruning_no_expert_keeps_every_tensor(source: Path, tmp_path: Path, saliency: Saliency) -> None:
    report = prune(source, 8, saliency)
    assert differing(read_tensors(tmp_path / "result"), read_tensors(source)) == []
    assert all((layer.output_error, layer.router.top_k_agreement) == (0.0, 1.0) for layer in report.layers)


# Scores of whole subsets

SUBSET_LOSSES = {Saliency.GRAM: DroppedEnergy, Saliency.OMP: ScaledResidual}


def stored(source: Path, folder: Path) -> StatisticsFile:
    """Statistics of the same run."""
    convert(source, options(source, 4, statistics=folder / "statistics", output=folder / "collected"))
    return StatisticsFile(folder / "statistics")


@pytest.mark.parametrize("saliency", SUBSET_LOSSES)
@pytest.mark.parametrize("model_type", ["mixtral", "llama4_text"])
def test_the_subset_that_loses_least_by_the_products_of_outputs_stays(
    tmp_path: Path, saliency: Saliency, model_type: str
) -> None:
    is_llama = model_type == "llama4_text"
    shapes = {"num_local_experts": 8, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1} if is_llama else {}
    source = build(tmp_path / "model", model_type, **shapes)
    report, file = prune(source, 3, saliency), stored(source, tmp_path)
    subsets = np.array(list(combinations(range(8), 3)))
    for layer in report.layers:
        gram_EE = file.layer(layer.layer).gram_EE
        assert gram_EE is not None
        losses = SUBSET_LOSSES[saliency](gram_EE.numpy()).of(subsets)
        assert tuple(kept(layer)) == tuple(subsets[losses.argmin()])


@pytest.mark.parametrize("saliency", [*SUBSET_LOSSES, Saliency.MAN, Saliency.TOTAL_MASS])
def test_protected_experts_stay_whatever_the_score(source: Path, saliency: Saliency) -> None:
    first = kept(prune(source, 3, saliency).layers[0])
    dropped = next(expert for expert in range(8) if expert not in first)
    layer = prune(source, 3, saliency, protect=((0, dropped),)).layers[0]
    assert dropped in kept(layer)
    assert len(kept(layer)) == 3


def test_weights_and_norms_rank_experts_as_observed(source: Path, tmp_path: Path) -> None:
    file = stored(source, tmp_path)
    for saliency, name in ((Saliency.MAN, "norm_E"), (Saliency.TOTAL_MASS, "mass_E")):
        for layer in prune(source, 3, saliency).layers:
            score_E = getattr(file.layer(layer.layer), name)
            assert kept(layer) == sorted(score_E.argsort(descending=True)[:3].tolist())


# The reconstruction error


def with_subset(source: Path, rows: tuple[int, ...]) -> list[float]:
    """Errors of both layers when exactly these experts stay, measured by a conversion of its own."""
    protect = tuple((None, expert) for expert in rows)
    report = prune(source, len(rows), Saliency.REAP, protect=protect)
    assert [kept(layer) for layer in report.layers] == [list(rows)] * 2
    return [layer.output_error for layer in report.layers]


def test_the_subset_with_the_smallest_measured_error_stays(tmp_path: Path) -> None:
    source = build(tmp_path / "model", num_local_experts=4)
    errors = {rows: with_subset(source, rows) for rows in combinations(range(4), 2)}
    report = prune(source, 2, Saliency.RECONSTRUCTION)
    for number, layer in enumerate(report.layers):
        by_subset = {rows: both[number] for rows, both in errors.items()}
        assert len(set(by_subset.values())) == 6
        assert tuple(kept(layer)) == min(by_subset, key=lambda rows: by_subset[rows])
        assert layer.output_error == pytest.approx(min(by_subset.values()), rel=1e-5)


def test_the_reconstruction_error_leaves_less_error_than_any_score(source: Path) -> None:
    best = prune(source, 4, Saliency.RECONSTRUCTION)
    for saliency in SCORES:
        pairs = zip(best.layers, prune(source, 4, saliency).layers, strict=True)
        assert all(one.output_error <= other.output_error * (1 + 1e-5) for one, other in pairs)


def test_the_reconstruction_error_is_measured_on_the_sampled_tokens(source: Path, tmp_path: Path) -> None:
    # 3 of 64 tokens are another problem than all of them.
    method = MethodOptions(preset=Preset.REAP, saliency=Saliency.RECONSTRUCTION)
    wanted = options(source, 4, method=method)
    few = replace(wanted, calibration=replace(wanted.calibration, feature_tokens=3), output=tmp_path / "few")
    pairs = zip(convert(source, wanted).layers, convert(source, few).layers, strict=True)
    assert any(one.labels != other.labels for one, other in pairs)


def test_the_reconstruction_error_of_experts_that_see_scaled_inputs_is_refused(tmp_path: Path) -> None:
    source = build(
        tmp_path / "model", "llama4_text", num_local_experts=8, intermediate_size_mlp=48, interleave_moe_layer_step=1
    )
    method = MethodOptions(preset=Preset.REAP, saliency=Saliency.RECONSTRUCTION)
    error = refuse(source, PlanError, options(source, 4, method=method))
    assert "the router weight multiplies an expert's input" in error.message
    assert "`saliency`" in error.hint
