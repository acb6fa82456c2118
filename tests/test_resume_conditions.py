"""What an interrupted conversion goes on from: the same options, the same source, and what is still there of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interruptions import UNFINISHED, InterruptedHere, at_layer, comparable, go_on, interrupt, undisturbed
from tiny_models import build, change_tensors, contents, options, token_ids

from hcsmoe_hub import convert
from hcsmoe_hub.checkpoint.unfinished import progress
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.events import Stage
from hcsmoe_hub.options import ConvertOptions, Layout, Preset
from hcsmoe_hub.pipeline import progress as progress_module

LAYER = 3


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build(tmp_path / "model", num_hidden_layers=LAYER + 1)


@pytest.fixture
def wanted(source: Path) -> ConvertOptions:
    """A conversion that was interrupted."""
    asked = options(source, 4, measure=False)
    interrupt(source, asked, at_layer(LAYER))
    return asked


def with_method(**changes: Any) -> Callable[[ConvertOptions], ConvertOptions]:
    return lambda asked: replace(asked, method=replace(asked.method, **changes))


def with_text(**changes: Any) -> Callable[[ConvertOptions], ConvertOptions]:
    return lambda asked: replace(asked, calibration=replace(asked.calibration, **changes))


# By the option that the message names: what is changed, and both values.
OTHERS: dict[str, tuple[Callable[[ConvertOptions], ConvertOptions], str]] = {
    "experts": (lambda asked: replace(asked, experts=3), "4, not 3"),
    "max_shard_size": (lambda asked: replace(asked, max_shard_size="30KB"), "5GB, not 30KB"),
    "preset": (with_method(preset=Preset.REAP), "hc-smoe, not reap"),
    "layout": (with_method(layout=Layout.FULL), "none, not full"),
    "sequence_length": (with_text(sequence_length=8), "none, not 8"),
    "figure": (lambda asked: replace(asked, figure=True), "False, not True"),
}


@pytest.mark.parametrize("option", OTHERS)
def test_another_conversion_is_refused_with_the_option_and_both_values(
    source: Path, wanted: ConvertOptions, option: str
) -> None:
    change, values = OTHERS[option]
    before = contents(source.parent)
    with pytest.raises(PlanError) as caught:
        convert(source, change(wanted))
    assert caught.value.message == (
        f"{wanted.output} holds an interrupted conversion with another `{option}`: {values}."
    )
    assert caught.value.hint == "use the same options to go on with it, or add `restart=True` to begin anew"
    assert caught.value.option == option
    assert contents(source.parent) == before
    assert go_on(source, wanted) == {Stage.CONVERT: LAYER}


def test_a_source_that_has_changed_is_refused(source: Path, wanted: ConvertOptions) -> None:
    change_tensors(source, lambda tensors: tensors["lm_head.weight"].mul_(2))
    with pytest.raises(
        PlanError, match="holds an interrupted conversion with another content of the source: "
    ) as found:
        convert(source, wanted)
    assert found.value.hint == "use the same options to go on with it, or add `restart=True` to begin anew"
    assert go_on(source, replace(wanted, restart=True)) == {}
    assert comparable(source.parent / "result") == undisturbed(source, wanted)


def test_what_changes_no_byte_may_be_another(source: Path, wanted: ConvertOptions) -> None:
    assert go_on(source, replace(wanted, low_disk=True, max_memory="100GB", overwrite=True)) == {Stage.CONVERT: LAYER}


@pytest.mark.parametrize("changes", [{"restart": True}, {"checkpoint": False}, {"restart": True, "experts": 3}])
def test_a_conversion_can_begin_anew(source: Path, wanted: ConvertOptions, changes: dict[str, Any]) -> None:
    anew = replace(wanted, **changes)
    assert go_on(source, anew) == {}
    assert not (source.parent / "result" / UNFINISHED).exists()
    assert comparable(source.parent / "result") == undisturbed(source, anew)


def lose(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def alter(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [lose, cut, alter])
@pytest.mark.parametrize(
    ("names", "done"),
    [
        (("convert-2.states-0",), 2),
        (("convert-2.results",), 2),
        (("convert-2.states-0", "convert-1.states-0"), 0),
        (("convert-0.results",), 0),
        (("calibration",), LAYER),
    ],
    ids=str,
)
def test_what_is_lost_or_damaged_is_done_again(
    source: Path, wanted: ConvertOptions, names: tuple[str, ...], done: int, damage: Callable[[Path], None]
) -> None:
    assert wanted.output is not None
    for name in names:
        damage(progress(wanted.output) / name)
    assert go_on(source, wanted) == ({Stage.CONVERT: done} if done else {})
    assert comparable(wanted.output) == undisturbed(source, wanted)


def test_text_that_has_changed_meanwhile_does_not_matter(source: Path, wanted: ConvertOptions) -> None:
    file = Path(str(wanted.calibration.dataset))
    before = file.read_bytes()
    np.save(file, token_ids(8, 8).numpy())
    assert go_on(source, wanted) == {Stage.CONVERT: LAYER}
    file.write_bytes(before)
    assert comparable(source.parent / "result") == undisturbed(source, wanted)


def test_what_ends_a_run_before_it_goes_on_costs_nothing(
    source: Path, wanted: ConvertOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: Any) -> None:
        raise InterruptedHere

    with monkeypatch.context() as patched:
        patched.setattr(progress_module, "identity", stop)
        with pytest.raises(InterruptedHere):
            convert(source, wanted)
    assert go_on(source, wanted) == {Stage.CONVERT: LAYER}
