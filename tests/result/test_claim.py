"""Who may write to an output folder, and what is left there of a conversion that ends early."""

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from interruptions import InterruptedHere, at_layer, comparable, interrupt, undisturbed
from tiny_models import build, contents, options

from hcsmoe_hub import convert
from hcsmoe_hub.checkpoint.owner import OwnedError, Owner
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.checkpoint.unfinished import EXPLANATION, UNFINISHED, is_complete
from hcsmoe_hub.errors import HcsmoeError, OutputError, SourceError, kept_until
from hcsmoe_hub.events import Event, Stage, StageStarted
from hcsmoe_hub.hub.open import open_source
from hcsmoe_hub.model_cards import write_card
from hcsmoe_hub.options import ConvertOptions
from hcsmoe_hub.publishing.files import check_result
from hcsmoe_hub.result import claim as claim_module
from hcsmoe_hub.result.verify import verify


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Mixtral of three layers."""
    return build(tmp_path / "model", num_hidden_layers=3)


@pytest.fixture
def wanted(source: Path) -> ConvertOptions:
    """A conversion that measures nothing, in several shards."""
    return options(source, 4, measure=False, max_shard_size="20KB")


def stages(source: Path, wanted: ConvertOptions) -> list[Stage]:
    """Converts; returns the stages that were begun."""
    begun: list[Stage] = []

    def listen(event: Event) -> None:
        if isinstance(event, StageStarted):
            begun.append(event.stage)

    convert(source, wanted, listener=listen)
    return begun


def cut_move(monkeypatch: pytest.MonkeyPatch, source: Path, wanted: ConvertOptions, *, after: int) -> None:
    """Converts, and ends like a killed process after some files were moved."""
    assert wanted.output is not None
    output, moved, rename = wanted.output, list[Path](), os.replace

    def moving(old: Path, new: Path) -> None:
        if Path(new).parent == output:
            moved.append(new)
            if len(moved) > after:
                raise InterruptedHere
        rename(old, new)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", moving)
        # A process that is killed cleans nothing up.
        patched.setattr(claim_module, "discard", lambda _: None)
        with pytest.raises(InterruptedHere):
            convert(source, wanted)
    assert is_complete(output)


# What is left


def test_a_conversion_that_ended_in_its_first_layer_leaves_nothing(source: Path, wanted: ConvertOptions) -> None:
    before = contents(source.parent)
    interrupt(source, wanted, at_layer(0))
    assert contents(source.parent) == before


def test_a_conversion_with_work_behind_it_leaves_one_folder_that_says_what_it_is(
    source: Path, wanted: ConvertOptions
) -> None:
    interrupt(source, wanted, at_layer(1))
    assert wanted.output is not None
    assert [path.name for path in wanted.output.iterdir()] == [UNFINISHED]
    text = (wanted.output / UNFINISHED / EXPLANATION).read_text("utf-8")
    assert "unfinished conversion of hcsmoe" in text
    assert "run the same command again" in text


def test_what_ends_a_conversion_says_where_it_goes_on(source: Path, wanted: ConvertOptions) -> None:
    def listen(event: Event) -> None:
        if at_layer(1)(event):
            raise OutputError("the disk is full.", hint="free some space")

    with pytest.raises(OutputError) as caught:
        convert(source, wanted, listener=listen)
    assert kept_until(caught.value) == "in layer 2 (convert)"
    assert "What was done is kept, and the same options go on: it ended in layer 2 (convert)." in caught.value.__notes__


def test_without_checkpoints_nothing_is_left(source: Path, wanted: ConvertOptions) -> None:
    before = contents(source.parent)
    interrupt(source, replace(wanted, checkpoint=False), at_layer(1))
    assert contents(source.parent) == before


def test_files_that_are_put_next_to_an_unfinished_conversion_do_not_keep_it_from_going_on(
    source: Path, wanted: ConvertOptions
) -> None:
    interrupt(source, wanted, at_layer(1))
    (source.parent / "result" / "log.txt").write_text("mine")
    convert(source, wanted)
    assert (source.parent / "result" / "log.txt").read_text() == "mine"


def test_an_old_result_is_there_until_the_new_one_is_complete(source: Path, wanted: ConvertOptions) -> None:
    convert(source, wanted)
    assert wanted.output is not None
    before = contents(wanted.output)
    again = replace(wanted, experts=3, overwrite=True)
    interrupt(source, again, at_layer(1))
    assert {name: before[name] for name in before} == {
        name: content for name, content in contents(wanted.output).items() if not name.startswith(UNFINISHED)
    }
    # Neither is the one taken for a part of the other.
    assert LocalSource(wanted.output).files() == sorted(before)
    assert check_result(wanted.output).path == wanted.output
    convert(source, again)
    assert comparable(wanted.output) == undisturbed(source, replace(again, overwrite=False))


# Not taken for a model

READERS: dict[str, Callable[[Path], Any]] = {
    "verify": verify,
    "inspect and evaluate": lambda folder: open_source(str(folder)),
    "push": check_result,
    "card": write_card,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("below", [".", UNFINISHED, f"{UNFINISHED}/result"])
def test_an_unfinished_conversion_is_refused_with_what_it_is(tmp_path: Path, reader: str, below: str) -> None:
    folder = tmp_path / "result"
    (folder / UNFINISHED / "result").mkdir(parents=True)
    (folder / UNFINISHED / EXPLANATION).touch()
    with pytest.raises(
        SourceError, match=r"result holds an unfinished conversion, begun 20..-.*, and not a model\."
    ) as caught:
        READERS[reader](folder / below)
    assert caught.value.hint.startswith("run the same command again to go on, or delete ")


def test_a_folder_that_is_being_written_to_is_refused_with_the_process_that_does(tmp_path: Path) -> None:
    place = tmp_path / UNFINISHED
    place.mkdir()
    with (
        claim_module.owning(place),
        pytest.raises(SourceError, match=rf"writing to it \(process {os.getpid()} on .*\)"),
    ):
        verify(tmp_path)


# One at a time


def test_a_second_conversion_is_refused_with_the_name_of_the_first(source: Path, wanted: ConvertOptions) -> None:
    refusals: list[HcsmoeError] = []

    def listen(event: Event) -> None:
        if at_layer(0)(event):
            with pytest.raises(OutputError) as caught:
                convert(source, wanted)
            refusals.append(caught.value)

    convert(source, wanted, listener=listen)
    (refusal,) = refusals
    assert f"another conversion is writing to {wanted.output}: process {os.getpid()} on " in refusal.message
    assert refusal.hint == "wait for it, or choose another folder with `output`"
    assert comparable(source.parent / "result") == undisturbed(source, wanted)


def test_a_conversion_that_may_run_on_another_machine_is_named_with_what_to_do(
    source: Path, wanted: ConvertOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = replace(Owner.of_this_process(), host="elsewhere", pid=7)

    def refuse(folder: Path) -> None:
        raise OwnedError(owner, is_certain=False)

    monkeypatch.setattr(claim_module, "owning", refuse)
    with pytest.raises(OutputError, match="or was killed there: process 7 on elsewhere, since ") as caught:
        convert(source, wanted)
    assert caught.value.hint.startswith("if it no longer runs, delete ")


# What is found


def test_what_an_earlier_version_has_left_is_removed(source: Path, wanted: ConvertOptions) -> None:
    output = source.parent / "result"
    output.mkdir()
    for name in (UNFINISHED, "model-00001-of-00009.safetensors", "model-00002-of-00009.safetensors.incomplete"):
        (output / name).write_text("left")
    (output / "notes.txt").write_text("mine")
    convert(source, wanted)
    assert not [name for name in contents(output) if "of-00009" in name or UNFINISHED in name]
    assert (output / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("after", [0, 3])
def test_the_same_command_finishes_a_move_that_was_cut_short_without_converting_again(
    source: Path, wanted: ConvertOptions, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    cut_move(monkeypatch, source, wanted, after=after)
    with pytest.raises(SourceError, match="interrupted while its files were moved to their places"):
        verify(source.parent / "result")
    assert stages(source, wanted) == []
    assert comparable(source.parent / "result") == undisturbed(source, wanted)
    assert not (source.parent / "result" / UNFINISHED).exists()


def test_what_ends_a_run_before_it_finishes_a_move_costs_nothing(
    source: Path, wanted: ConvertOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: Any) -> None:
        raise InterruptedHere

    cut_move(monkeypatch, source, wanted, after=3)
    with monkeypatch.context() as patched:
        patched.setattr("hcsmoe_hub.pipeline.progress.identity", stop)
        with pytest.raises(InterruptedHere):
            convert(source, wanted)
    assert stages(source, wanted) == []
    assert comparable(source.parent / "result") == undisturbed(source, wanted)


def test_another_command_keeps_a_result_whose_move_was_cut_short(
    source: Path, wanted: ConvertOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_move(monkeypatch, source, wanted, after=3)
    with pytest.raises(OutputError, match="holds a complete result: an earlier run was interrupted"):
        convert(source, replace(wanted, experts=3))
    assert comparable(source.parent / "result") == undisturbed(source, wanted)


def test_a_disk_that_fails_during_the_move_costs_nothing_even_without_checkpoints(
    source: Path, wanted: ConvertOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, hasty = os.replace, replace(wanted, checkpoint=False)

    def moving(old: Path, new: Path) -> None:
        if Path(new) == source.parent / "result" / "hcsmoe.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(old, new)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", moving)
        with pytest.raises(OSError, match="Input/output error"):
            convert(source, hasty)
    assert stages(source, hasty) == []
    assert comparable(source.parent / "result") == undisturbed(source, hasty)


@pytest.mark.parametrize("choice", ["overwrite", "restart"])
def test_a_result_whose_move_was_cut_short_can_be_replaced(
    source: Path, wanted: ConvertOptions, monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    cut_move(monkeypatch, source, wanted, after=3)
    other = replace(wanted, experts=3)
    convert(source, replace(other, **{choice: True}))
    assert comparable(source.parent / "result") == undisturbed(source, other)
