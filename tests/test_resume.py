"""A conversion that was interrupted goes on where it was, and ends in the same bytes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from held_out_text import held_out_ids, hold_out
from interruptions import UNFINISHED, at_layer, comparable, go_on, interrupt, undisturbed
from tiny_models import build, options

from hcsmoe_hub import convert
from hcsmoe_hub.events import Stage
from hcsmoe_hub.options import (
    Budget,
    ConvertOptions,
    Layout,
    MethodOptions,
    Preset,
    Propagate,
    Refit,
    RouterPolicy,
    Target,
)

LAYERS = 4


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Mixtral of four layers, and text that is held out."""
    hold_out(monkeypatch, held_out_ids())
    return build(tmp_path / "model", num_hidden_layers=LAYERS)


def check(source: Path, wanted: ConvertOptions, layer: int, stage: Stage = Stage.CONVERT) -> dict[Stage, int]:
    """Interrupts a conversion in a layer, goes on, and compares the result; returns what was not done again."""
    assert wanted.output is not None
    is_written = wanted.statistics is not None and not wanted.statistics.exists()
    interrupt(source, wanted, at_layer(layer, stage))
    left = [path.name for path in wanted.output.parent.glob("result/*")]
    assert left == ([UNFINISHED] if layer or stage is Stage.OBSERVE else [])
    resumed = go_on(source, wanted)
    found, statistics = comparable(wanted.output), wanted.statistics
    if statistics is not None and is_written:
        written = statistics.read_bytes()
        statistics.unlink()
    expected = undisturbed(source, wanted)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert statistics is None or not is_written or written == statistics.read_bytes()
    return resumed


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_conversion_goes_on_at_the_layer_in_which_it_was_interrupted(source: Path, layer: int) -> None:
    resumed = check(source, options(source, 4), layer)
    assert resumed == ({Stage.CONVERT: layer} if layer else {})


METHODS: dict[str, dict[str, Any]] = {
    "merged": {"method": MethodOptions(propagate=Propagate.MERGED)},
    "merged without a refit": {"method": MethodOptions(refit=Refit.NONE, propagate=Propagate.MERGED)},
    "original": {"method": MethodOptions(propagate=Propagate.ORIGINAL)},
    "down": {"method": MethodOptions(refit=Refit.DOWN)},
    "pruning": {"method": MethodOptions(preset=Preset.REAP)},
    "groups around dominant experts": {"method": MethodOptions(preset=Preset.M_SMOE, layout=Layout.FULL)},
    "fitted router": {"method": MethodOptions(preset=Preset.HC_SMOE, router=RouterPolicy.FIT)},
    "mapped": {"method": MethodOptions(preset=Preset.HC_SMOE, layout=Layout.MAPPED)},
    "factored": {"method": MethodOptions(layout=Layout.FACTORED, refit=Refit.NONE, compress="8,0.9"), "figure": True},
    "narrower": {"expert_width": 24},
    "figure": {"figure": True},
    "statistics": {"statistics": True},
    "statistics without states": {"statistics": True, "keep_states": False},
    "unmeasured": {"measure": False},
    "small shards": {"max_shard_size": "30KB"},
    "some layers": {"method": MethodOptions(preset=Preset.HC_SMOE, layout=Layout.MAPPED, layers=(1, 2))},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_on_to_the_same_bytes(source: Path, name: str) -> None:
    changes = dict(METHODS[name])
    if changes.pop("statistics", False):
        changes["statistics"] = source.parent / "statistics"
    assert check(source, options(source, 4, **changes), 2) == {Stage.CONVERT: 2}


def test_both_passes_of_a_budget_go_on(source: Path) -> None:
    method = MethodOptions(preset=Preset.HC_SMOE, budget=Budget.FREQUENCY, layout=Layout.MAPPED)
    wanted = options(source, 4, method=method)
    assert check(source, wanted, 1, Stage.OBSERVE) == {Stage.OBSERVE: 2}
    again = replace(wanted, output=source.parent / "again" / "result")
    assert check(source, again, 3) == {Stage.CONVERT: 3}


def test_both_passes_of_a_target_go_on(source: Path) -> None:
    wanted = replace(options(source, 4), experts=None, target=Target(ratio=0.5))
    assert check(source, wanted, 1, Stage.OBSERVE) == {Stage.OBSERVE: 2}
    again = replace(wanted, output=source.parent / "again" / "result")
    assert check(source, again, 1) == {Stage.OBSERVE: LAYERS, Stage.CONVERT: 1}


def test_a_conversion_from_statistics_goes_on(source: Path) -> None:
    file = source.parent / "statistics"
    convert(source, options(source, 4, statistics=file, output=source.parent / "first"))
    for number, method in enumerate((MethodOptions(), MethodOptions(preset=Preset.REAP))):
        wanted = options(source, 5, statistics=file, method=method, output=source.parent / str(number) / "result")
        assert check(source, wanted, 2) == {Stage.CONVERT: 2}


def test_choices_of_another_conversion_are_applied_to_the_same_bytes(source: Path) -> None:
    convert(source, options(source, 4, output=source.parent / "first"))
    wanted = replace(options(source, None, like=str(source.parent / "first")), method=MethodOptions())
    assert check(source, wanted, 2) == {Stage.CONVERT: 2}
