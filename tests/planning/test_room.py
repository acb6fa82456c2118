"""Too little disk or memory: a warning of the plan, which says what would fit, and a refusal of the conversion."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from places import EXAMPLE
from tiny_models import build, contents, options

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, convert
from hcsmoe_hub import plan as plan_conversion
from hcsmoe_hub.checkpoint.durable import write_bytes
from hcsmoe_hub.checkpoint.unfinished import COMPLETE, UNFINISHED
from hcsmoe_hub.convert import execute
from hcsmoe_hub.errors import OutputError, PlanError
from hcsmoe_hub.machine.memory import available_memory
from hcsmoe_hub.machine.units import format_bytes
from hcsmoe_hub.options import Layout, Merge, Preset, Refit
from hcsmoe_hub.planning import room
from hcsmoe_hub.planning.checkpoint_cost import checkpoint_bytes
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.estimate import estimate_needs
from hcsmoe_hub.planning.memory import cheaper_options
from hcsmoe_hub.planning.room import check_room, room_warnings, shortages


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Mixtral: 2 layers, 8 experts, 2 per token."""
    return build(tmp_path / "model")


def give(monkeypatch: pytest.MonkeyPatch, *, memory: int) -> None:
    """Lets the machine have so many bytes of memory."""
    monkeypatch.setattr(room, "available_memory", lambda: memory)


def with_free(free: int, asked: list[Path]) -> Callable[[Path], Any]:
    """Stands for ``shutil.disk_usage``."""
    return lambda path: asked.append(path) or type("Usage", (), {"free": free})


def large(**choices: Any) -> ConversionPlan:
    """A plan on much text, of which most of the estimate depends."""
    calibration = CalibrationOptions(**{"samples": 4096, "sequence_length": 512} | choices.pop("calibration", {}))
    return plan_conversion(EXAMPLE, ConvertOptions(experts=4, calibration=calibration, **choices))


def disk_bytes(plan: ConversionPlan) -> int:
    return plan.shards.file_bytes + checkpoint_bytes(plan)


def needed(plan: ConversionPlan) -> int:
    return estimate_needs(plan).memory_bytes


# Disk


def test_a_result_that_does_not_fit_on_the_disk_is_planned_with_a_warning_and_not_converted(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = options(source, 4, output=source.parent / "new" / "deep")
    size, asked = disk_bytes(plan_conversion(source, wanted)), list[Path]()
    monkeypatch.setattr("shutil.disk_usage", with_free(size, asked))
    assert plan_conversion(source, wanted).warnings == []
    monkeypatch.setattr("shutil.disk_usage", with_free(size - 1, asked))
    (warning,) = plan_conversion(source, wanted).warnings
    said = f"the result needs {format_bytes(size)}, but {source.parent} has {format_bytes(size - 1)} free."
    assert warning == f"{said} Choose another disk with `output`."
    # The nearest folder that exists lies on the disk in question.
    assert set(asked) == {source.parent}
    before = contents(source.parent)
    with pytest.raises(OutputError) as caught:
        convert(source, wanted)
    assert caught.value.message == said
    assert contents(source.parent) == before


def test_what_an_interrupted_run_has_written_is_not_needed_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = options(source, 4)
    plan = plan_conversion(source, wanted)
    plan.staging.mkdir(parents=True)
    write_bytes(plan.staging / "model.safetensors", bytes(8192))
    monkeypatch.setattr("shutil.disk_usage", with_free(disk_bytes(plan) - 8192, []))
    assert plan_conversion(source, wanted).warnings == []
    monkeypatch.setattr("shutil.disk_usage", with_free(disk_bytes(plan) - 8193, []))
    (warning,) = plan_conversion(source, wanted).warnings
    assert warning.startswith("the result needs ")
    # A complete result needs nothing, wherever it lies.
    (plan.output / UNFINISHED / COMPLETE).touch()
    monkeypatch.setattr("shutil.disk_usage", with_free(0, []))
    assert plan_conversion(source, wanted).warnings == []
    assert len(plan_conversion(source, replace(wanted, restart=True)).warnings) == 1


@pytest.mark.parametrize("old_bytes", [999, 1000])
def test_an_old_result_needs_room_next_to_the_new_one_and_may_be_deleted_first(
    source: Path, monkeypatch: pytest.MonkeyPatch, old_bytes: int
) -> None:
    wanted = options(source, 4, overwrite=True)
    plan = plan_conversion(source, wanted)
    plan.output.mkdir()
    (plan.output / "config.json").touch()
    (plan.output / "model.safetensors").write_bytes(bytes(old_bytes))
    monkeypatch.setattr("shutil.disk_usage", with_free(disk_bytes(plan) - 1000, []))
    (warning,) = plan_conversion(source, wanted).warnings
    offered = "or delete the old result first, which otherwise stays until the new one is complete."
    assert warning.endswith(offered) == (old_bytes == 1000)


# Memory


def test_a_peak_above_what_is_available_is_planned_with_a_warning_and_not_converted(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = options(source, 4)
    peak = needed(plan_conversion(source, wanted))
    give(monkeypatch, memory=peak)
    assert plan_conversion(source, wanted).warnings == []
    give(monkeypatch, memory=peak - 1)
    (warning,) = plan_conversion(source, wanted).warnings
    assert warning.startswith(f"the conversion needs about {format_bytes(peak)} of memory, but ")
    before = contents(source.parent)
    with pytest.raises(PlanError) as caught:
        convert(source, wanted)
    assert warning.startswith(caught.value.message)
    assert caught.value.hint == (
        "use a machine with more memory, or set `max_memory` above the estimate to start regardless"
    )
    assert contents(source.parent) == before


def test_a_limit_above_the_estimate_starts_a_conversion_on_any_machine_and_leaves_a_warning(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, memory=1000)
    peak = needed(plan_conversion(source, options(source, 4)))
    report = convert(source, options(source, 4, max_memory=peak))
    (warning,) = report.warnings
    assert warning.endswith("1.0 KB are available; it starts regardless, as `max_memory` allows that much.")


def test_a_plan_is_checked_again_when_it_begins(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_conversion(source, options(source, 4))
    give(monkeypatch, memory=1000)
    with pytest.raises(PlanError, match=r"1\.0 KB are available"):
        execute(plan)
    assert not plan.output.exists()


def test_what_is_offered_fits_and_one_sample_more_does_not() -> None:
    plan = large()
    limit = needed(plan) * 3 // 4
    (method, text) = cheaper_options(plan, limit)
    assert method.startswith("`preset='hc-smoe'` (")
    samples = int(text.partition("=")[2].partition("`")[0])
    fits = needed(large(calibration={"samples": samples}))
    assert fits <= limit < needed(large(calibration={"samples": samples + 1}))
    assert text == f"`samples={samples}` ({format_bytes(fits)})"
    other = needed(large(method=MethodOptions(preset=Preset.HC_SMOE)))
    assert other <= limit
    assert method == f"`preset='hc-smoe'` ({format_bytes(other)})"


def test_a_cheaper_method_on_less_text_is_offered_where_neither_is_enough() -> None:
    plan = large()
    cheapest = needed(large(method=MethodOptions(preset=Preset.HC_SMOE), calibration={"samples": 150}))
    (both,) = cheaper_options(plan, cheapest)
    assert both.startswith("`preset='hc-smoe'` with `samples=150` (")


def test_the_usual_amount_of_text_is_offered_where_far_more_was_planned() -> None:
    usual = needed(large(method=MethodOptions(preset=Preset.HC_SMOE), calibration={"samples": 128}))
    (both,) = cheaper_options(large(calibration={"samples": 10**5}), usual)
    assert both.startswith("`preset='hc-smoe'` with `samples=128` (")


def test_a_merge_that_compares_no_neurons_is_offered_in_place_of_one_that_does() -> None:
    little = {"samples": 1, "sequence_length": 8}
    plan = large(method=MethodOptions(merge=Merge.ZIPIT), calibration=little, measure=False)
    plain = needed(large(method=MethodOptions(merge=Merge.FREQUENCY), calibration=little, measure=False))
    assert needed(plan) > plain
    assert f"`merge='frequency'` ({format_bytes(plain)})" in cheaper_options(plan, plain)


def test_a_refusal_for_a_limit_names_what_would_fit() -> None:
    limit = needed(large(method=MethodOptions(preset=Preset.HC_SMOE)))
    assert limit < needed(large())
    with pytest.raises(PlanError) as caught:
        large(max_memory=limit)
    assert "of `max_memory`" in caught.value.message
    assert caught.value.hint.startswith("use `preset='hc-smoe'`")
    assert caught.value.hint.endswith("or raise `max_memory`")


def test_nothing_is_offered_that_the_plan_does_already() -> None:
    plan = large(method=MethodOptions(preset=Preset.HC_SMOE))
    found = cheaper_options(plan, needed(plan) - 1)
    assert [words for words in found if "hc-smoe" in words] == []
    assert any(words.startswith("`samples=") for words in found)


def test_a_layout_that_was_chosen_stays() -> None:
    plan = large(method=MethodOptions(layout=Layout.MAPPED))
    assert [words for words in cheaper_options(plan, needed(plan) - 1) if "samples" not in words] == []


def test_a_refit_that_was_chosen_is_offered_in_a_cheaper_form() -> None:
    plan = large(method=MethodOptions(preset=Preset.REAP, refit=Refit.BLOCK))
    none = needed(large(method=MethodOptions(preset=Preset.REAP)))
    assert f"`refit='none'` ({format_bytes(none)})" in cheaper_options(plan, needed(plan) - 1)


def test_token_ids_are_as_many_as_they_are(source: Path) -> None:
    plan = plan_conversion(source, options(source, 4, method=MethodOptions()))
    assert [words for words in cheaper_options(plan, needed(plan) - 1) if "samples" in words] == []


def test_both_shortages_are_warned_of_and_the_disk_is_refused_first(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_conversion(source, options(source, 4))
    give(monkeypatch, memory=1000)
    monkeypatch.setattr("shutil.disk_usage", with_free(1000, []))
    assert [type(error) for error in shortages(plan)] == [OutputError, PlanError]
    assert len(room_warnings(plan)) == 2
    with pytest.raises(OutputError):
        check_room(plan)


# What the machine has


@pytest.fixture
def groups(tmp_path: Path) -> Path:
    (tmp_path / "groups" / "outer" / "inner").mkdir(parents=True)
    return tmp_path / "groups"


def limit(folder: Path, most: str, used: int, *, cached: int = 0, version: int = 2) -> None:
    """Gives a control group a limit."""
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, content in zip(names, (most, str(used)), strict=True):
        (folder / name).write_text(f"{content}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 1\n")


def held(groups: Path, membership: str) -> int:
    """What is available beyond what this process holds already."""
    file = groups / "cgroup"
    file.write_text(membership)
    mine = available_memory(groups / "nowhere", groups / "nothing") - available_memory(groups, file)
    return mine


@pytest.mark.parametrize("place", ["outer/inner", "outer", ""])
def test_the_limit_of_a_container_counts_wherever_it_is_set(groups: Path, place: str) -> None:
    limit(groups / place, "10000", 4000, cached=500)
    (groups / "cgroup").write_text("0::/outer/inner\n")
    found = available_memory(groups, groups / "cgroup") - psutil.Process().memory_info().rss
    # Cached files are given up; this process may have grown a little meanwhile.
    assert abs(found - (10000 - 4000 + 501)) < 50_000_000


def test_a_container_without_a_limit_has_what_the_machine_has(groups: Path) -> None:
    limit(groups / "outer", "max", 4000)
    assert abs(held(groups, "0::/outer/inner\n")) < 500_000_000


def test_the_limit_of_an_older_control_group_counts(groups: Path) -> None:
    (groups / "memory" / "job").mkdir(parents=True)
    limit(groups / "memory" / "job", "10000", 4000, version=1)
    assert held(groups, "12:cpu:/x\n3:memory:/job\n0::/\n") > 100_000_000


def test_a_machine_without_control_groups_has_what_it_has(tmp_path: Path) -> None:
    assert available_memory(tmp_path, tmp_path / "cgroup") > 10_000_000
