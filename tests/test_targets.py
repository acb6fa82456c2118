"""A target in bytes, parameters or as a share: what meets it, what is chosen, and what the result then has."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from architectures import save_tiny
from tiny_models import build, contents, options, read_config, refuse
from torch import Tensor

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, convert
from hcsmoe_hub import plan as plan_conversion
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.options import Budget, Layout, Preset, Target
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.sizes import active_parameter_counts, parameter_counts, weight_bytes

EXPERTS, NEURONS = 8, 48


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Mixtral: 2 layers, 8 experts of 48 neurons, 2 per token."""
    return build(tmp_path / "model")


def aim(source: Path, *, ids: Tensor | None = None, **others: Any) -> ConvertOptions:
    """Options of a conversion to a target: keywords of ``Target``, or of ``ConvertOptions``."""
    limits = {name: others.pop(name) for name in ("size", "parameters", "active", "ratio") if name in others}
    wanted = options(source, EXPERTS, ids=ids, **others)
    return replace(wanted, experts=None, target=Target(**limits))


def shapes(plan: ConversionPlan) -> list[tuple[int, int]]:
    """K and W of the candidates."""
    assert plan.target is not None
    return [(candidate.shape.experts, candidate.shape.width) for candidate in plan.target.candidates]


# Candidates


def test_every_number_of_experts_has_the_width_that_uses_a_ratio_up(source: Path) -> None:
    found = plan_conversion(source, aim(source, ratio=0.5))
    assert not found.is_final
    # A width that is a multiple of 8 or 16 may cost a sixteenth of the neurons.
    assert shapes(found) == [(8, 24), (6, 32), (4, 48)]
    assert found.target is not None
    assert max(candidate.ratio for candidate in found.target.candidates) == 0.5


@pytest.mark.parametrize("limit", [{"size": 250_000}, {"parameters": 60_000}, {"active": 30_000}, {"ratio": 0.6}])
def test_candidates_meet_the_limit_and_none_exceeds_another(source: Path, limit: dict[str, Any]) -> None:
    planned = plan_conversion(source, aim(source, **limit))
    assert planned.target is not None
    for candidate in planned.target.candidates:
        assert candidate.uses(planned.target.target) <= planned.target.target.limit
    found = shapes(planned)
    assert found == sorted(found, key=lambda shape: (-shape[0], shape[1]))
    assert len({width for _, width in found}) == len(found)


def test_active_parameters_alone_leave_all_experts(source: Path) -> None:
    # Fewer experts save rows of the router, which are active too, and leave room for a neuron or two.
    (experts, width), *others = shapes(plan_conversion(source, aim(source, active=30_000)))
    assert experts == EXPERTS
    assert all(wider - width <= 2 for _, wider in others)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_what_candidates_have_is_what_their_results_have(tmp_path: Path, model_type: str) -> None:
    source = build(tmp_path / "model", model_type)
    planned = plan_conversion(source, aim(source, ratio=0.6))
    assert planned.target is not None
    for candidate in planned.target.candidates:
        shape = candidate.shape
        width = None if shape.narrowed is None else shape.width
        found = plan_conversion(source, replace(options(source, shape.experts), expert_width=width))
        assert candidate.parameters == parameter_counts(found)["after"]
        assert candidate.active == active_parameter_counts(found)["after"]
        assert candidate.weights_bytes == weight_bytes(found)["after"]


def test_groups_of_experts_stay_whole(tmp_path: Path) -> None:
    source = build(tmp_path / "model", "deepseek_v3")
    assert {experts % 2 for experts, _ in shapes(plan_conversion(source, aim(source, ratio=0.6)))} == {0}


@pytest.mark.parametrize("layout", [Layout.MAPPED, Layout.FULL])
def test_a_layout_without_a_width_has_one_candidate(source: Path, layout: Layout) -> None:
    method = MethodOptions(preset=Preset.HC_SMOE, layout=layout)
    planned = plan_conversion(source, aim(source, ratio=0.4, method=method))
    assert shapes(planned) == [(3, NEURONS)]
    assert planned.is_final


def test_a_server_whose_router_knows_few_numbers_of_experts_gets_one_of_them(tmp_path: Path) -> None:
    save_tiny("deepseek_v4", tmp_path / "model")
    planned = plan_conversion(tmp_path / "model", aim(tmp_path / "model", ratio=0.9))
    # Of the router's own numbers 3 to 6, vLLM's kernel has 4; the 6 of the source stay possible.
    assert {experts for experts, _ in shapes(planned)} <= {4, 6}
    assert 4 in {experts for experts, _ in shapes(planned)}


# Refusals


def test_less_than_the_smallest_result_is_refused_with_its_size(source: Path) -> None:
    error = refuse(source, PlanError, aim(source, parameters=1_000))
    assert "has only 1.00 K parameters: the smallest one, 2 experts of 8 neurons, has" in error.message
    assert error.option == "parameters"


def test_more_than_the_source_has_is_refused(source: Path) -> None:
    error = refuse(source, PlanError, aim(source, size=10**9))
    assert "already, not more than the 1.0 GB of weights of `size`" in error.message


def test_a_target_and_a_number_of_experts_are_too_much() -> None:
    with pytest.raises(PlanError, match="both are given"):
        ConvertOptions(experts=4, target=Target(ratio=0.5))
    with pytest.raises(PlanError, match="neither is given"):
        ConvertOptions()
    with pytest.raises(PlanError, match="`size` and `ratio` are given"):
        Target(size=10, ratio=0.5)


# Conversions


def test_a_conversion_converts_what_it_chose_and_says_so(source: Path) -> None:
    report = convert(source, aim(source, ratio=0.5))
    target = report.target
    assert target is not None
    assert (target["limit"], target["value"]) == ("ratio", 0.5)
    assert target["chosen"] is not None
    chosen = target["candidates"][target["chosen"]]
    errors = [candidate["predicted_error"] for candidate in target["candidates"]]
    assert None not in errors
    assert chosen["predicted_error"] == min(error for error in errors if error is not None)
    config = read_config(source.parent / "result")
    assert (config["num_local_experts"], config["intermediate_size"]) == (chosen["experts"], chosen["width"])
    assert report.experts["after"] == chosen["experts"]
    assert report.weights_bytes["after"] == chosen["weights_bytes"]
    assert report.parameters["after"] == chosen["parameters"]
    assert report.active_parameters["after"] == chosen["active_parameters"]
    assert report.timings_seconds.keys() >= {"observe", "convert"}


def test_the_result_is_that_of_the_chosen_numbers(source: Path) -> None:
    report = convert(source, aim(source, ratio=0.5, output=source.parent / "target"))
    width = report.experts.get("width_after")
    numbers = replace(options(source, report.experts["after"]), expert_width=width, output=source.parent / "numbers")
    convert(source, numbers)
    results = [contents(source.parent / name) for name in ("target", "numbers")]
    assert all(result.pop("hcsmoe.json") and result.pop("README.md") for result in results)
    assert results[0] == results[1]


def test_statistics_that_hold_losses_make_a_plan_final(source: Path) -> None:
    wanted = aim(source, ratio=0.5, statistics=source.parent / "file", output=source.parent / "first")
    first = convert(source, wanted)
    again = replace(wanted, output=source.parent / "second", calibration=CalibrationOptions())
    planned = plan_conversion(source, again)
    assert planned.is_final
    assert convert(source, again).target == first.target
    results = [contents(source.parent / name) for name in ("first", "second")]
    assert all(result.pop("hcsmoe.json") and result.pop("README.md") for result in results)
    assert results[0] == results[1]


def test_statistics_without_losses_serve_a_choice_from_their_sample(source: Path) -> None:
    file = source.parent / "file"
    convert(source, options(source, 4, statistics=file, output=source.parent / "first"))
    wanted = replace(aim(source, ratio=0.5, statistics=file), calibration=CalibrationOptions())
    assert not plan_conversion(source, wanted).is_final
    report = convert(source, wanted)
    assert report.target is not None
    assert report.target["chosen"] is not None
    assert report.target["candidates"][0]["predicted_error"] is not None


def test_a_budget_spends_what_a_target_leaves(source: Path) -> None:
    method = MethodOptions(preset=Preset.HC_SMOE, budget=Budget.FREQUENCY, layout=Layout.FULL)
    report = convert(source, aim(source, ratio=0.5, method=method))
    assert sum(layer.experts for layer in report.layers) == 4 * len(report.layers)
