"""Different numbers of experts per layer, and layers that are not changed: totals, floors, and refusals."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, change_tensors, contents, options, read_config, read_tensors, refuse, same_bits
from torch import Tensor

from hcsmoe_hub import MethodOptions, convert
from hcsmoe_hub import plan as plan_conversion
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.events import Event, StageAdvanced, StageStarted
from hcsmoe_hub.options import Budget, Clustering, Layout, Linkage, Merge, Method, Preset
from hcsmoe_hub.report import ConversionReport

EXPERTS = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"
LAYERS = 4
BUDGETS = [Budget.FREQUENCY, Budget.M_SMOE]
TIED = [Layout.MAPPED, Layout.FULL]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Mixtral of 4 layers and 8 experts, whose first router chooses two experts nearly always."""
    folder = build(tmp_path / "model", num_hidden_layers=LAYERS)

    def favour(tensors: dict[str, Tensor]) -> None:
        direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
        # Opposite rows: one of each pair is far ahead of all others on every token.
        tensors[ROUTER.format(0)][:4] = torch.stack([direction, -direction, direction.roll(1), -direction.roll(1)]) * 9

    change_tensors(folder, favour)
    return folder


def run(source: Path, experts: int, *, output: str = "result", **method: Any) -> ConversionReport:
    """Converts with a method to a folder next to the source."""
    wanted = options(
        source, experts, method=MethodOptions(preset=Preset.HC_SMOE, **method), output=source.parent / output
    )
    return convert(source, wanted)


def counts(report: ConversionReport) -> list[int]:
    """Experts that each layer has left."""
    return [layer.experts for layer in report.layers]


def by_hand(usage: Sequence[Sequence[int]], total: int, floor: int) -> list[int]:
    """Clusters per layer: the floor first, then the most frequent of all other experts."""
    ranked = [sorted((count / sum(layer) for count in layer), reverse=True) for layer in usage]
    rest = sorted(((share, -number) for number, shares in enumerate(ranked) for share in shares[floor:]), reverse=True)
    chosen = [-number for _, number in rest[: total - floor * len(usage)]]
    return [floor + chosen.count(number) for number in range(len(usage))]


# Every pair of values once.
@pytest.mark.parametrize(
    ("budget", "floor", "layout", "experts"),
    [
        (Budget.FREQUENCY, 2, Layout.MAPPED, 3),
        (Budget.FREQUENCY, 2, Layout.FULL, 5),
        (Budget.M_SMOE, 1, Layout.MAPPED, 5),
        (Budget.M_SMOE, 1, Layout.FULL, 3),
    ],
)
def test_layers_get_clusters_by_their_frequent_experts(
    source: Path, budget: Budget, floor: int, layout: Layout, experts: int
) -> None:
    report = run(source, experts, budget=budget, layout=layout)
    found = counts(report)
    assert sum(found) == experts * LAYERS
    assert min(found) >= floor
    assert found == by_hand([layer.usage for layer in report.layers], experts * LAYERS, floor)
    assert len(set(found)) > 1
    assert [len(set(layer.labels)) for layer in report.layers] == found


def test_only_the_floor_distinguishes_the_budgets(source: Path) -> None:
    # The first layer uses only one or two experts.
    plans = [counts(run(source, 2, output=budget, budget=budget, layout=Layout.FULL)) for budget in BUDGETS]
    assert plans[0] == [2] * LAYERS
    assert min(plans[1]) == 1
    assert sum(plans[1]) == 2 * LAYERS


@pytest.mark.parametrize("layout", TIED)
def test_two_passes_give_what_a_statistics_file_gives(source: Path, layout: Layout) -> None:
    method = MethodOptions(budget=Budget.FREQUENCY, layout=layout)
    parent = source.parent
    for name, file in (("direct", None), ("collected", parent / "file"), ("recalled", parent / "file")):
        convert(source, options(source, 4, method=method, output=parent / name, statistics=file))
    results = [contents(parent / name) for name in ("direct", "collected", "recalled")]
    assert all(result.pop("hcsmoe.json") and result.pop("README.md") for result in results)
    assert results[0] == results[1] == results[2]


def test_a_plan_is_final_only_where_the_usage_is_known(source: Path) -> None:
    wanted = options(source, 4, method=MethodOptions(budget=Budget.FREQUENCY, layout=Layout.FULL))
    before = plan_conversion(source, wanted)
    assert not before.is_final
    assert before.experts_by_layer == dict.fromkeys(range(LAYERS), 4)
    with_file = replace(wanted, statistics=source.parent / "file")
    report = convert(source, with_file)
    after = plan_conversion(source, replace(with_file, output=source.parent / "other"))
    assert after.is_final
    assert list(after.experts_by_layer.values()) == counts(report)
    uniform = options(source, 4, output=source.parent / "other")
    assert plan_conversion(source, uniform).is_final


def test_both_passes_report_their_progress(source: Path) -> None:
    events: list[Event] = []
    wanted = options(source, 4, method=MethodOptions(budget=Budget.FREQUENCY, layout=Layout.FULL))
    report = convert(source, wanted, listener=events.append)
    started = [(event.stage.value, event.total) for event in events if isinstance(event, StageStarted)]
    assert started == [("calibration", 1), ("observe", LAYERS), ("convert", LAYERS), ("verify", 1)]
    advanced = [event.stage.value for event in events if isinstance(event, StageAdvanced)]
    assert advanced == ["observe"] * LAYERS + ["convert"] * LAYERS
    assert report.timings_seconds.keys() == {"calibration", "observe", "convert", "verify"}


def test_the_mapped_layout_stores_as_many_experts_as_each_layer_has(source: Path) -> None:
    report = run(source, 4, budget=Budget.FREQUENCY, layout=Layout.MAPPED)
    tensors = read_tensors(source.parent / "result")
    config = read_config(source.parent / "result")
    for layer in report.layers:
        stored = {name for name in tensors if f"layers.{layer.layer}." in name and ".w1." in name}
        assert stored == {EXPERTS.format(layer.layer, expert, "w1") for expert in range(layer.experts)}
        assert config["hcsmoe"]["expert_map"][str(layer.layer)] == layer.labels
        assert same_bits(tensors[ROUTER.format(layer.layer)], read_tensors(source)[ROUTER.format(layer.layer)])
    assert config["num_local_experts"] == 8


# Protection and size limits


def test_protected_experts_stay_alone_within_the_budget(source: Path) -> None:
    protect = ((None, 7), (0, 5), (0, 6))
    report = run(source, 4, budget=Budget.M_SMOE, layout=Layout.FULL, protect=protect)
    assert sum(counts(report)) == 4 * LAYERS
    # Three protected experts and a cluster for the others.
    assert counts(report)[0] >= 4
    for layer in report.layers:
        alone = {7, 5, 6} if layer.layer == 0 else {7}
        assert all(layer.labels.count(layer.labels[expert]) == 1 for expert in alone)
    before, after = read_tensors(source), read_tensors(source.parent / "result")
    name = EXPERTS.format(0, 5, "w2")
    assert same_bits(after[name], before[name])


def test_a_size_limit_raises_the_floor_of_every_layer(source: Path) -> None:
    free = run(source, 3, output="free", budget=Budget.M_SMOE, layout=Layout.FULL)
    assert min(counts(free)) < 3
    report = run(source, 3, budget=Budget.M_SMOE, layout=Layout.FULL, max_cluster_size=3)
    assert counts(report) == [3] * LAYERS
    for layer in report.layers:
        assert max(map(layer.labels.count, layer.labels)) <= 3


@pytest.mark.parametrize(
    ("method", "limit"),
    [
        ({"linkage": Linkage.SINGLE}, 2),
        ({"linkage": Linkage.SINGLE}, 3),
        ({"clustering": Clustering.KMEANS}, 2),
        ({"clustering": Clustering.SINGLE_SHOT}, 3),
    ],
    ids=str,
)
def test_no_cluster_is_larger_than_the_limit(source: Path, method: dict[str, Any], limit: int) -> None:
    report = run(source, 4, max_cluster_size=limit, **method)
    assert all(layer.experts == 4 for layer in report.layers)
    assert all(max(map(layer.labels.count, layer.labels)) <= limit for layer in report.layers)


def test_limits_and_budgets_that_cannot_be_met_are_refused_when_the_usage_is_known(source: Path) -> None:
    file = source.parent / "file"
    convert(source, options(source, 4, output=source.parent / "first", statistics=file))
    method = MethodOptions(budget=Budget.FREQUENCY, layout=Layout.FULL, max_cluster_size=1)
    error = refuse(source, PlanError, options(source, 4, method=method, statistics=file))
    assert "they must keep 32 to 32" in error.message


# Some layers only


@pytest.mark.parametrize("layout", TIED)
def test_layers_that_are_not_named_keep_all_their_bits(source: Path, layout: Layout) -> None:
    report = run(source, 3, layers=(1, 3), layout=layout)
    assert counts(report) == [8, 3, 8, 3]
    before, after = read_tensors(source), read_tensors(source.parent / "result")
    for layer in (0, 2):
        names = {name for name in before if f"layers.{layer}." in name}
        assert [name for name in names if not same_bits(after[name], before[name])] == []
        assert report.layers[layer].labels == list(range(8))
        assert report.layers[layer].output_error == 0
    assert report.layers[1].output_error > 0


def test_a_budget_is_spent_on_the_named_layers_only(source: Path) -> None:
    report = run(source, 4, layers=(0, 1, 3), layout=Layout.MAPPED, budget=Budget.M_SMOE)
    assert counts(report)[2] == 8
    found = [counts(report)[layer] for layer in (0, 1, 3)]
    assert found == by_hand([report.layers[layer].usage for layer in (0, 1, 3)], 12, 1)


# Refusals


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_reduced_layout_refuses_a_budget_and_names_the_nearest_uniform_plan(source: Path, budget: Budget) -> None:
    error = refuse(source, PlanError, options(source, 3, method=MethodOptions(preset=Preset.HC_SMOE, budget=budget)))
    assert f"`budget='{budget}'` gives each layer its own number of experts" in error.message
    assert "The nearest uniform plan keeps 3 in each, 12 in all." in error.message
    assert error.hint == "use `layout='mapped'` or `layout='full'`, or `budget='uniform'`"


LAYOUT = {"layout": Layout.FULL}
REFUSALS: list[tuple[int, dict[str, Any], str, str]] = [
    (3, {"layers": (0, 1)}, "`layers` leaves 2 MoE layers with all their experts", "`layout='mapped'`"),
    (3, {"layers": (1, 4, 9), **LAYOUT}, "`layers` names 4, 9, but the MoE layers of", "MoE layers only"),
    (3, {"layers": (), **LAYOUT}, "`layers` names none", "MoE layers only"),
    (3, {"protect": ((None, 8),)}, "`protect` names expert 8 of every layer", "LAYER:EXPERT"),
    (3, {"protect": ((4, 0),)}, "`protect` names expert 0 of layer 4", "LAYER:EXPERT"),
    (3, {"protect": ((1, 0), (1, 1), (1, 2))}, "the other 5 would have to become 0", "`experts=4` or more"),
    (
        3,
        {"method": Method.PRUNE, "protect": tuple((1, expert) for expert in range(4))},
        "the other 4 would have to become -1",
        "`experts=5` or more",
    ),
    (3, {"max_cluster_size": 2}, "3 clusters of at most 2 experts hold 6, but layer 0 has 8", "`max_cluster_size=3`"),
    (
        4,
        {"max_cluster_size": 2, "protect": ((2, 0),)},
        "3 clusters of at most 2 experts hold 6, but layer 2 has 7",
        "`max_cluster_size=3`",
    ),
    (9, LAYOUT, "cannot keep 9 experts per layer", "a number from 1 to 8"),
]


@pytest.mark.parametrize(("experts", "method", "message", "hint"), REFUSALS, ids=lambda value: str(value)[:50])
def test_numbers_that_do_not_fit_the_model_are_refused(
    source: Path, experts: int, method: dict[str, Any], message: str, hint: str
) -> None:
    error = refuse(source, PlanError, options(source, experts, method=MethodOptions(preset=Preset.HC_SMOE, **method)))
    assert message in error.message
    assert hint in error.hint


@pytest.mark.parametrize(
    ("experts", "method"),
    [
        (4, {"protect": ((1, 0), (1, 1), (1, 2))}),
        (3, {"method": Method.PRUNE, "protect": ((1, 0), (1, 1), (1, 2))}),
        (3, {"max_cluster_size": 3}),
        (1, {"layout": Layout.MAPPED}),
        (3, {"layers": (0, 1, 2, 3)}),
        (8, {"protect": tuple((None, expert) for expert in range(8))}),
    ],
    ids=str,
)
def test_numbers_just_inside_the_limits_are_converted(source: Path, experts: int, method: dict[str, Any]) -> None:
    assert counts(run(source, experts, **method)) == [experts] * LAYERS


def test_the_merge_of_a_budget_is_that_of_its_clusters(source: Path) -> None:
    report = run(source, 4, budget=Budget.FREQUENCY, layout=Layout.FULL, merge=Merge.AVERAGE)
    before, after = read_tensors(source), read_tensors(source.parent / "result")
    for layer in report.layers:
        for expert in range(8):
            members = [other for other in range(8) if layer.labels[other] == layer.labels[expert]]
            parts = [before[EXPERTS.format(layer.layer, member, "w3")] for member in members]
            found = after[EXPERTS.format(layer.layer, expert, "w3")]
            torch.testing.assert_close(found, torch.stack(parts).mean(0), rtol=1e-5, atol=1e-6)
