"""What a plan puts on an accelerator of a certain size, and what it says where that is too small; no GPU is needed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from places import EXAMPLE

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, PlanError
from hcsmoe_hub import plan as plan_conversion
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.machine.units import format_bytes
from hcsmoe_hub.options import CurveOptions, Merge, Preset, Refit
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.curve_plan import plan_curve
from hcsmoe_hub.planning.estimate import estimate_needs
from hcsmoe_hub.planning.make import make_plan
from hcsmoe_hub.planning.memory_use import memory_use
from hcsmoe_hub.planning.placement import placed
from hcsmoe_hub.planning.room import shortages

PLENTY = 10**12
TEXT = CalibrationOptions(samples=512, sequence_length=512)


def planned(
    room: int | None, *, device: str = "cuda", preset: Preset = Preset.HC_SMOE, **choices: Any
) -> ConversionPlan:
    """A plan for so many bytes of an accelerator; the predictions of so small a model would outweigh its layers."""
    method = MethodOptions(preset=preset, **choices.pop("method", {}))
    given = {"calibration": TEXT, "measure": False, **choices}
    options = ConvertOptions(experts=4, method=method, device=device, **given)
    return make_plan(LocalSource(EXAMPLE), options, device_room=room, compute=torch.bfloat16)


def on_device(plan: ConversionPlan) -> int:
    return estimate_needs(plan).device_bytes


def least(**choices: Any) -> int:
    """Bytes of the accelerator that a conversion takes with all that can be on the host there."""
    return on_device(planned(1, **choices))


# Where everything is


def test_everything_is_on_an_accelerator_that_has_room() -> None:
    plan = planned(PLENTY)
    assert plan.keeps_states_on_device
    assert not plan.experts_on_host
    assert plan.warnings == []


def test_on_the_host_nothing_is_anywhere_else() -> None:
    plan = planned(None, device="cpu")
    assert not plan.keeps_states_on_device
    assert estimate_needs(plan).device_bytes == 0


def test_hidden_states_move_to_the_host_first_and_are_counted_there() -> None:
    plenty = planned(PLENTY)
    moved = planned(on_device(plenty) - 1, batch_tokens=plenty.batch_tokens)
    assert not moved.keeps_states_on_device
    assert not moved.experts_on_host
    states = on_device(plenty) - on_device(moved)
    assert states > 0
    assert estimate_needs(moved).memory_bytes - estimate_needs(plenty).memory_bytes == states


def test_micro_batches_shrink_before_experts_move() -> None:
    large = replace(planned(PLENTY), keeps_states_on_device=False)
    half = replace(large, batch_tokens=large.batch_tokens // 2)
    smaller = placed(replace(large, device_room=memory_use(half).device))
    assert not smaller.keeps_states_on_device
    assert not smaller.experts_on_host
    assert smaller.batch_tokens == half.batch_tokens


def test_micro_batches_of_the_options_stay_what_they_are() -> None:
    assert planned(1, batch_tokens=4096).batch_tokens == 4096


def test_experts_wait_on_the_host_where_a_layer_is_too_large() -> None:
    given = {"batch_tokens": 512}
    without_states = replace(planned(PLENTY, **given), keeps_states_on_device=False)
    moved = planned(memory_use(without_states).device - 1, **given)
    assert moved.experts_on_host
    assert memory_use(moved).device < memory_use(without_states).device
    assert memory_use(moved).host > memory_use(without_states).host


@pytest.mark.parametrize("refit", [Refit.DOWN, Refit.BLOCK])
def test_a_refit_is_counted_where_it_is_made(refit: Refit) -> None:
    # Large micro-batches would take more than a refit of so small a layer.
    plain, fitted = (planned(PLENTY, method={"refit": each}, batch_tokens=512) for each in (Refit.NONE, refit))
    assert memory_use(fitted).device > memory_use(plain).device
    assert memory_use(fitted).host == memory_use(plain).host


def test_zipit_compares_neurons_on_the_accelerator_and_joins_them_on_the_host() -> None:
    text = CalibrationOptions(samples=1, sequence_length=8)
    merges = (Merge.FREQUENCY, Merge.ZIPIT)
    plain, zipped = (planned(PLENTY, method={"merge": merge}, calibration=text) for merge in merges)
    assert memory_use(zipped).device > memory_use(plain).device
    assert memory_use(zipped).host > memory_use(plain).host


def test_no_phase_is_smaller_than_the_weights_that_are_in_it() -> None:
    plan = planned(PLENTY)
    layer = max(
        sum(plan.model.skeleton.state[name].numel() for name in set(group.targets.values()))
        for number, group in plan.model.groups.items()
        if number is not None
    )
    assert memory_use(plan).device > 2 * 2 * layer


# Too small


def test_what_does_not_fit_is_warned_of_with_options_that_do() -> None:
    room = (least(preset=Preset.HC_REFIT) + least()) // 2
    plan = planned(room, preset=Preset.HC_REFIT)
    (warning,) = plan.warnings
    needed, free = format_bytes(on_device(plan)), format_bytes(room)
    assert warning.startswith(f"the conversion needs about {needed} on cuda:0, but {free} are free there.")
    assert "Use `preset='hc-smoe'` (" in warning
    assert warning.endswith("or `device='cpu'`.")
    assert [type(error) for error in shortages(plan)] == [PlanError]
    assert planned(room, preset=Preset.HC_SMOE).warnings == []


def test_what_is_offered_for_the_accelerator_needs_what_it_says() -> None:
    room = (least(preset=Preset.HC_REFIT) + least()) // 2
    (warning,) = planned(room, preset=Preset.HC_REFIT).warnings
    assert f"`preset='hc-smoe'` ({format_bytes(on_device(planned(room)))})" in warning


def test_where_nothing_fits_the_host_is_left() -> None:
    (warning,) = planned(1000).warnings
    assert warning.endswith("1.0 KB are free there. Use `device='cpu'`.")


def test_a_device_with_a_number_is_named_by_it() -> None:
    assert "on cuda:1, but" in planned(1000, device="cuda:1").warnings[0]


def test_auto_runs_on_the_host_where_the_accelerator_is_too_small_and_says_so() -> None:
    room = (least(preset=Preset.HC_REFIT) + least()) // 2
    plan = planned(room, device="auto", preset=Preset.HC_REFIT)
    assert not plan.on_device
    assert plan.options.device == "cpu"
    warning = plan.warnings[0]
    assert f"but {format_bytes(room)} are free there. It runs on the CPU instead, as `device='auto'` allows." in warning
    assert "To run it there, use `preset='hc-smoe'` (" in warning
    assert "device='cpu'" not in warning


def test_auto_keeps_an_accelerator_that_has_room() -> None:
    plan = planned(PLENTY, device="auto")
    assert plan.on_device
    assert plan.warnings == []


def test_a_limit_for_the_accelerator_refuses_the_plan() -> None:
    with pytest.raises(PlanError) as caught:
        planned(1000, max_memory={"cuda:0": 1000})
    assert "on cuda:0, but `max_memory` allows 1.0 KB there." in caught.value.message
    assert caught.value.option == "device"


def test_a_limit_for_the_host_is_none_for_the_accelerator() -> None:
    assert planned(PLENTY, max_memory="1TB").warnings == []


def test_a_device_that_this_machine_lacks_is_refused_before_anything_is_read() -> None:
    with pytest.raises(PlanError, match="`device='cuda:7'` was requested, but torch finds"):
        plan_conversion("no/such-folder", ConvertOptions(experts=4, device="cuda:7"))


# Curves


def curve_of(room: int, device: str) -> Any:
    options = CurveOptions(experts=(8, 4), expert_width=("100%",), device=device, calibration=TEXT)
    return plan_curve(LocalSource(EXAMPLE), options, device_room=room)


def test_a_curve_that_does_not_fit_the_accelerator_is_refused_or_runs_on_the_host() -> None:
    with pytest.raises(PlanError, match=r"^the curve needs about .* on cuda:0, but 1\.0 KB are free there\."):
        curve_of(1000, "cuda")
    plan = curve_of(1000, "auto")
    assert all(not point.on_device for point in plan.points)
    assert "It runs on the CPU instead" in plan.warnings[0]
