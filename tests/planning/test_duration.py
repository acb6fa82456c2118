"""How long a plan takes: from what it does, and the rates of its machine."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from core_rates import CORE
from places import EXAMPLE

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions
from hcsmoe_hub import plan as plan_conversion
from hcsmoe_hub.hub.open import open_source
from hcsmoe_hub.layer import router_fit
from hcsmoe_hub.machine.known_rates import H100
from hcsmoe_hub.machine.rates import DiskRates, Products, Rates
from hcsmoe_hub.options import Preset, Refit
from hcsmoe_hub.planning import work
from hcsmoe_hub.planning.checkpoint_cost import checkpoint_written_bytes
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.duration import START_SECONDS, plan_duration
from hcsmoe_hub.planning.faster import LONG_SECONDS, long_warning, may_take_long
from hcsmoe_hub.planning.make import make_plan
from hcsmoe_hub.planning.model_refit import training_states_bytes
from hcsmoe_hub.planning.work import count_work


def planned(preset: Preset, *, tokens: int = 65_536, refit: Refit | None = None) -> ConversionPlan:
    """A conversion of the example on much or little text."""
    calibration = CalibrationOptions(samples=tokens // 64, sequence_length=64)
    method = MethodOptions(preset=preset, refit=refit)
    return plan_conversion(EXAMPLE, ConvertOptions(experts=4, method=method, calibration=calibration, device="cpu"))


def seconds(plan: ConversionPlan, rates: Rates = CORE) -> float:
    return plan_duration(plan, rates).seconds


def slower(rates: Rates, factor: float) -> Rates:
    """The same machine with slower products."""
    products = rates.device.products
    names = ("float32", "float64", "bfloat16", "tf32", "few_rows")
    slow = Products(**{name: getattr(products, name) / factor for name in names})
    return replace(rates, device=replace(rates.device, products=slow))


def test_presets_take_longer_in_the_order_of_their_arithmetic() -> None:
    reap, smoe, default = map(seconds, map(planned, (Preset.REAP, Preset.HC_SMOE, Preset.HC_REFIT)))
    assert START_SECONDS < reap < smoe < default


def test_a_slower_machine_takes_longer_by_what_is_slower() -> None:
    plan = planned(Preset.HC_SMOE)
    fast, slow = (plan_duration(plan, rates) for rates in (CORE, slower(CORE, 10)))
    assert slow.products == pytest.approx(10 * fast.products)
    assert slow.read == fast.read
    assert slow.memory == fast.memory
    assert slow.binds == "arithmetic"


def test_what_goes_on_side_by_side_counts_once() -> None:
    duration = plan_duration(planned(Preset.REAP), CORE)
    alone = duration.start + max(duration.lanes.values())
    assert alone < duration.seconds < duration.start + sum(duration.lanes.values())


def test_a_slow_disk_binds() -> None:
    plan = planned(Preset.REAP, tokens=128)
    tape = DiskRates(read=1e3, write=1e6)
    duration = plan_duration(plan, replace(CORE, source_disk=tape))
    assert duration.binds == "reading"
    assert duration.seconds > count_work(plan).read_bytes / 1e3


def test_keeping_the_states_of_a_training_counts_as_writing() -> None:
    plan = planned(Preset.HC_SMOE, refit=Refit.MODEL)
    without = replace(plan, options=replace(plan.options, checkpoint=False))
    more = count_work(plan).written_bytes - count_work(without).written_bytes
    assert more == checkpoint_written_bytes(plan) > training_states_bytes(plan) > 0
    assert checkpoint_written_bytes(without) == 0


def test_copies_count_only_where_there_is_an_accelerator() -> None:
    plan = planned(Preset.REAP)
    assert plan_duration(plan, H100).copy == 0
    assert plan_duration(plan, H100, on_device=True).copy > 0


def test_few_rows_per_expert_are_slower_than_many() -> None:
    many = planned(Preset.REAP)
    few = replace(many, batch_tokens=128)
    assert count_work(few).expert_rows == count_work(many).expert_rows * 128 / many.batch_tokens
    assert plan_duration(few, CORE).products > plan_duration(many, CORE).products


def test_bfloat16_and_float32_are_counted_at_their_own_rates() -> None:
    plan = planned(Preset.HC_REFIT)
    products = CORE.device.products
    matrix_cores = replace(CORE, device=replace(CORE.device, products=replace(products, bfloat16=1e12)))
    slow, fast = (plan_duration(plan, rates) for rates in (CORE, matrix_cores))
    assert fast.refit == pytest.approx(slow.refit * products.bfloat16 / 1e12)
    # Energies and fits of routers are float32 wherever they run.
    assert fast.products > count_work(plan).float32_flops / products.float32


def test_a_refit_of_down_projections_is_float32() -> None:
    work_done = count_work(planned(Preset.REAP, refit=Refit.DOWN))
    assert work_done.refit_flops == 0
    assert work_done.float32_flops > 0


def test_a_source_that_is_read_twice_counts_twice() -> None:
    plan = planned(Preset.REAP)
    assert count_work(replace(plan, is_final=False)).read_bytes == 2 * count_work(plan).read_bytes


def test_constants_are_those_of_the_layers() -> None:
    assert router_fit.ROUTER_TOKENS == work.ROUTER_TOKENS


def test_parts_of_a_document_are_seconds_and_say_what_binds() -> None:
    document = plan_duration(planned(Preset.REAP), CORE).as_dict()
    assert document.pop("binds") in ("reading", "writing", "copies", "arithmetic")
    assert document.keys() >= {"seconds", "start", "read", "write", "copy", "decode", "products", "refit", "memory"}
    assert all(isinstance(value, float) for value in document.values())


def test_a_plan_within_an_hour_says_nothing_and_needs_no_rates() -> None:
    plan = planned(Preset.HC_REFIT, tokens=1024)
    assert not may_take_long(plan)
    assert long_warning(plan, CORE) is None


def test_a_plan_of_more_than_an_hour_names_the_preset_that_takes_minutes() -> None:
    plan = planned(Preset.HC_REFIT)
    quick = plan_duration(plan, CORE)
    message = long_warning(plan, slower(CORE, 1.1 * LONG_SECONDS / (quick.products + quick.refit)))
    assert message is not None
    faster = r"`preset='(hc-smoe|reap)'` takes about \d+ min \d+ s\."
    assert re.fullmatch(rf"the conversion takes about 1 h \d+ min on this machine\. {faster}", message)


def test_where_every_preset_takes_hours_the_plan_names_a_machine_that_does_not() -> None:
    message = long_warning(planned(Preset.HC_REFIT), slower(CORE, 1e6))
    assert message is not None
    assert "and `preset='reap'` still about" in message
    assert "one H100 could do it in about" in message


def test_a_plan_on_an_accelerator_that_takes_hours_names_several(tmp_path: Path) -> None:
    options = ConvertOptions(experts=4, method=MethodOptions(preset=Preset.REAP), output=tmp_path / "result")
    plan = make_plan(open_source(str(EXAMPLE)), options, device_room=80_000_000_000, compute=torch.bfloat16)
    message = long_warning(plan, slower(CORE, 1e6))
    assert message is not None
    assert message.endswith("Several accelerators would share the work.")
