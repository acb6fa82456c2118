"""Recoveries that are interrupted: the same options go on, and end in the same bytes."""

import json
from dataclasses import replace
from pathlib import Path

import interruptions
import pytest
from recovered import StoppedHere, interrupt, run, wanted
from tiny_models import contents, differing, options, read_tensors

from hcsmoe_hub import ConvertOptions, convert
from hcsmoe_hub.convert import execute, plan
from hcsmoe_hub.errors import OutputError, PlanError, SourceError
from hcsmoe_hub.events import Event, Stage, StageResumed, StageStarted
from hcsmoe_hub.recover import recover
from hcsmoe_hub.recovery.preview import preview
from hcsmoe_hub.result.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")
UNFINISHED = "hcsmoe.incomplete"


def resumed(source: Path, **others) -> list[int]:
    """Goes on to the end; returns the steps that were not done again."""
    found = []

    def listen(event: Event) -> None:
        if isinstance(event, StageResumed) and event.stage is Stage.RECOVER:
            found.append(event.done)

    run(source, listener=listen, **others)
    return found


def timeless(record) -> dict:
    return {name: value for name, value in record.items() if name != "seconds"}


@pytest.mark.parametrize("train", ["router+experts+norms", "lora"])
def test_a_recovery_that_goes_on_ends_in_the_same_bytes(source, train):
    undisturbed = run(source, output=source.parent / "undisturbed", train=train)
    interrupt(source, 6, train=train)
    unfinished = source.parent / "recovered" / UNFINISHED
    assert unfinished.exists()
    assert resumed(source, train=train) == [4]
    found = source.parent / "recovered"
    assert not unfinished.exists()
    assert differing(read_tensors(found), read_tensors(undisturbed.output)) == []
    record = json.loads((found / "hcsmoe.json").read_text())["recovery"]
    assert timeless(record) == timeless(undisturbed.record)


def test_a_recovery_can_be_interrupted_twice(source):
    undisturbed = run(source, output=source.parent / "undisturbed")
    interrupt(source, 6)
    interrupt(source, 10)
    assert resumed(source) == [8]
    assert differing(read_tensors(source.parent / "recovered"), read_tensors(undisturbed.output)) == []


def test_nothing_is_left_before_the_first_state_is_saved(source):
    before = contents(source.parent)
    interrupt(source, 2)
    assert contents(source.parent) == before


def test_a_recovery_that_was_interrupted_while_it_wrote_is_not_trained_again(source):
    def at_verify(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage is Stage.VERIFY:
            raise StoppedHere

    with pytest.raises(StoppedHere):
        run(source, listener=at_verify)
    assert resumed(source) == [12]


def test_a_state_that_was_cut_short_does_not_count(source):
    interrupt(source, 10)
    states = sorted((source.parent / "recovered" / UNFINISHED).rglob("checkpoint-*"))
    assert [state.name for state in states] == ["checkpoint-4", "checkpoint-8"]
    (states[1] / "recovery.json").unlink()
    assert resumed(source) == [4]


def test_other_options_do_not_go_on(source):
    interrupt(source, 6)
    with pytest.raises(PlanError, match=r"interrupted recovery with another `temperature`: 2\.0, not 1\.0") as caught:
        run(source, temperature=1.0)
    assert caught.value.option == "temperature"
    assert resumed(source, temperature=1.0, restart=True) == []


def interrupt_conversion(source: Path) -> ConvertOptions:
    """Interrupts a conversion into the folder that recoveries write to."""
    conversion = options(source, 4, output=source.parent / "recovered")
    interruptions.interrupt(source, conversion, interruptions.at_layer(1))
    return conversion


def test_an_interrupted_conversion_is_not_given_up_by_a_recovery(source):
    conversion = interrupt_conversion(source)
    before = contents(source.parent)
    for attempt in (run, lambda source: preview(source.parent / "result", wanted(source))):
        with pytest.raises(OutputError, match=r"holds an interrupted conversion, begun 20.*, which a recovery"):
            attempt(source)
    assert contents(source.parent) == before
    convert(source, conversion)


def test_an_interrupted_recovery_is_not_given_up_by_a_conversion(source):
    interrupt(source, 6)
    before = contents(source.parent)
    conversion = options(source, 4, output=source.parent / "recovered")
    with pytest.raises(OutputError, match=r"holds an interrupted recovery, begun 20.*, which a conv") as caught:
        plan(source, conversion)
    assert "finish the recovery with the command that began it" in caught.value.hint
    assert "`restart=True`" in caught.value.hint
    assert contents(source.parent) == before
    assert resumed(source) == [4]


def test_a_conversion_that_was_planned_before_does_not_give_up_a_recovery_either(source):
    planned = plan(source, options(source, 4, output=source.parent / "recovered"))
    interrupt(source, 6)
    with pytest.raises(OutputError, match="holds an interrupted recovery"):
        execute(planned)
    assert resumed(source) == [4]


def test_a_restart_gives_up_what_is_of_the_other_kind(source):
    conversion = interrupt_conversion(source)
    assert resumed(source, restart=True) == []
    interrupt(source, 6, overwrite=True)
    convert(source, replace(conversion, overwrite=True, restart=True))
    assert "recovery" not in json.loads((source.parent / "recovered" / "hcsmoe.json").read_text())


def test_what_is_left_of_a_recovery_says_that_it_is_one(source):
    interrupt(source, 6)
    folder = source.parent / "recovered"
    text = (folder / UNFINISHED / "README.txt").read_text()
    assert "unfinished recovery of hcsmoe" in text
    assert "To give the recovery up" in text
    with pytest.raises(SourceError, match="holds an unfinished recovery, begun 20"):
        verify(folder)


def test_in_place_a_recovery_goes_on_as_well(source):
    result = source.parent / "result"
    undisturbed = run(source)
    interrupt(source, 6, output=result, overwrite=True)
    assert resumed(source, output=result, overwrite=True) == [4]
    assert differing(read_tensors(result), read_tensors(undisturbed.output)) == []


def test_a_move_that_was_cut_short_is_finished(source, monkeypatch):
    import os

    result, replace, moved = source.parent / "result", os.replace, []

    def stop(old, new):
        if Path(new).parent == result:
            if len(moved) == 2:
                raise StoppedHere
            moved.append(new)
        replace(old, new)

    monkeypatch.setattr("hcsmoe_hub.result.commit.os.replace", stop)
    with pytest.raises(StoppedHere):
        run(source, output=result, overwrite=True)
    monkeypatch.undo()
    assert not (result / "config.json").exists()
    report = recover(result, wanted(source, output=result, overwrite=True))
    assert report.record == json.loads((result / "hcsmoe.json").read_text())["recovery"]
    assert report.is_better
