"""``refit='model'`` that is killed at any moment: the next run goes on, and ends in the same bytes."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from held_out_text import held_out_ids, hold_out
from short_training import build_loud, shorten_training
from tiny_models import options, token_ids
from torch import Tensor

import hcsmoe_hub.pipeline.refit_model
from hcsmoe_hub import ConvertOptions, MethodOptions, convert, plan
from hcsmoe_hub.checkpoint.unfinished import progress, staging
from hcsmoe_hub.errors import OutputError
from hcsmoe_hub.events import Event, EventLog, Stage, StageAdvanced, StageResumed, Warned, ignore
from hcsmoe_hub.options import Preset, Refit
from hcsmoe_hub.pipeline import training_states
from hcsmoe_hub.pipeline.progress import Progress
from hcsmoe_hub.planning.model_refit import training_states_bytes
from hcsmoe_hub.report import ConversionReport

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = token_ids(32, 24)
# 28 pieces of 24 tokens, two at a time, seen four times.
STEPS = 56


def shorten(patch: pytest.MonkeyPatch) -> None:
    """A few small steps, each of which is saved, and held-out text to measure on."""
    shorten_training(patch)
    patch.setattr(training_states, "PAUSE", 0)
    hold_out(patch, held_out_ids(length=24))


@pytest.fixture(autouse=True)
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_loud(tmp_path_factory.mktemp("source") / "model", dtype=torch.bfloat16)


def wanted(source: Path, output: Path) -> ConvertOptions:
    method = MethodOptions(preset=Preset.REAP, refit=Refit.MODEL)
    return replace(options(source, 4, ids=TOKENS, method=method), output=output)


def same(first: Path, second: Path) -> bool:
    return all(path.read_bytes() == (second / path.name).read_bytes() for path in first.glob("*.safetensors"))


@dataclass
class Steps:
    """A listener that counts the steps of a training, and can end it after some.

    Attributes:
        last: Steps after which it ends.
        made: Steps that were made while it listened.
        resumed: Steps of an earlier run.
    """

    last: int | None = None
    made: int = 0
    resumed: int = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageResumed) and event.stage is Stage.REFIT:
            self.resumed = event.done
        if isinstance(event, StageAdvanced) and event.stage is Stage.REFIT:
            if self.made + self.resumed == self.last:
                raise KeyboardInterrupt
            self.made += 1


def kill(asked: ConvertOptions, source: Path, step: int) -> None:
    """Converts until a training has made so many steps, those of an earlier run included."""
    with pytest.raises(KeyboardInterrupt):
        convert(source, asked, listener=Steps(last=step))


def kept(asked: ConvertOptions) -> Path:
    """The folder of what is kept of a conversion."""
    assert asked.output is not None
    return progress(asked.output)


def states(asked: ConvertOptions) -> list[str]:
    """Names of what is kept of its training."""
    return sorted(path.name for path in kept(asked).glob("train*"))


@dataclass(frozen=True)
class Undisturbed:
    """A conversion that nothing has interrupted."""

    folder: Path
    report: ConversionReport


@pytest.fixture(scope="module")
def first(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("first") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        report = convert(source, wanted(source, folder))
    assert report.refit_model is not None
    assert report.refit_model.is_kept
    return Undisturbed(folder, report)


def figures(report: ConversionReport) -> dict[str, Any]:
    """What the report says of the training, but for its time."""
    assert report.refit_model is not None
    return {**asdict(report.refit_model), "seconds": 0, "measured": report.measured}


def test_a_training_that_is_killed_again_and_again_ends_in_the_same_bytes(
    source: Path, first: Undisturbed, tmp_path: Path
) -> None:
    asked, seen = wanted(source, tmp_path / "resumed"), list[list[str]]()
    for step in (0, 1, 29, 55):
        kill(asked, source, step)
        seen.append(states(asked))
    steps = Steps()
    resumed = convert(source, asked, listener=steps)
    assert seen == [[], ["training-0"], *[["training-0", "training-1"]] * 2]
    assert same(first.folder, tmp_path / "resumed")
    assert figures(resumed) == figures(first.report)
    assert (steps.resumed, steps.made) == (55, STEPS - 55)
    assert list((tmp_path / "resumed").glob("hcsmoe.incomplete")) == []


def test_the_plan_counts_what_a_training_keeps(source: Path, tmp_path: Path) -> None:
    asked = wanted(source, tmp_path / "resumed")
    kill(asked, source, 55)
    held = sum((kept(asked) / name).stat().st_size for name in states(asked))
    planned = training_states_bytes(plan(source, asked))
    # The values that come of it are written next to both states.
    assert 0.8 * planned < held < planned + 20_000
    assert training_states_bytes(plan(source, replace(asked, checkpoint=False))) == 0


def test_a_later_rate_goes_on_where_it_was_without_the_earlier_ones(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hcsmoe_hub.pipeline.refit_model, "rates_for", lambda share: [1000.0, 0.003])
    first = convert(source, wanted(source, tmp_path / "undisturbed"))
    asked, steps = wanted(source, tmp_path / "resumed"), Steps()
    for step in (STEPS, 30):
        kill(asked, source, step)
    resumed = convert(source, asked, listener=steps)
    # Of the second rate alone.
    assert (steps.resumed, steps.made) == (30, STEPS - 30)
    assert same(tmp_path / "undisturbed", tmp_path / "resumed")
    assert figures(resumed) == figures(first)


def test_a_kill_at_any_tensor_that_is_written_over_is_repaired_by_writing_all_again(
    source: Path, first: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = hcsmoe_hub.pipeline.refit_model.overwrite_tensor
    left: Iterator[int] = iter(())

    def torn(folder: Path, planned: Any, tensor: Tensor) -> None:
        if next(left, None) == 0:
            # Part of it has arrived.
            write(folder, planned, torch.cat([tensor.flatten()[:1], tensor.flatten()[:-1]]).reshape(tensor.shape))
            raise KeyboardInterrupt
        write(folder, planned, tensor)

    monkeypatch.setattr(hcsmoe_hub.pipeline.refit_model, "overwrite_tensor", torn)
    asked = wanted(source, tmp_path / "resumed")
    for number in (0, 17):
        left = reversed(range(number + 1))
        with pytest.raises(KeyboardInterrupt):
            convert(source, asked)
        assert states(asked) == ["trained"]
    resumed = convert(source, asked)
    assert same(first.folder, tmp_path / "resumed")
    assert figures(resumed) == figures(first.report)


def test_the_shards_are_not_touched_before_the_outcome_is_saved(
    source: Path, first: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced, asked = os.replace, wanted(source, tmp_path / "resumed")
    kill(asked, source, 1)
    before = {path: path.read_bytes() for path in staging(tmp_path / "resumed").glob("*.safetensors")}

    def fail(old: Path, new: Path) -> None:
        if Path(new).name == "trained":
            raise OSError(28, "No space left on device")
        replaced(old, new)

    with monkeypatch.context() as patch:
        patch.setattr("hcsmoe_hub.checkpoint.durable.os.replace", fail)
        with pytest.raises(OSError, match="No space"):
            convert(source, asked)
    assert before
    assert all(path.read_bytes() == content for path, content in before.items())
    convert(source, asked)
    assert same(first.folder, tmp_path / "resumed")


def test_a_damaged_state_is_reported_and_the_one_before_it_goes_on(
    source: Path, first: Undisturbed, tmp_path: Path
) -> None:
    asked, events = wanted(source, tmp_path / "resumed"), list[Event]()
    kill(asked, source, 20)
    newest = kept(asked) / json.loads((kept(asked) / "journal.jsonl").read_text().splitlines()[-1])["file"]
    newest.write_bytes(newest.read_bytes()[:-1])
    convert(source, asked, listener=events.append)
    assert same(first.folder, tmp_path / "resumed")
    messages = [event.message for event in events if isinstance(event, Warned)]
    assert f"{newest} has changed since it was written, so the training goes on from before it." in messages


def test_an_outcome_that_was_damaged_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    asked = wanted(source, tmp_path / "resumed")
    with monkeypatch.context() as patch:
        patch.setattr(hcsmoe_hub.pipeline.refit_model, "overwrite_tensor", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, asked)
    outcome = kept(asked) / "trained"
    outcome.write_bytes(outcome.read_bytes()[:-1])
    with pytest.raises(OutputError, match="the shards may already hold a part of it") as caught:
        convert(source, asked)
    assert caught.value.hint == "begin anew with `restart=True`"


@pytest.mark.parametrize(("takes", "expected"), [(0.01, range(40, 60)), (10.0, [1])])
def test_saving_takes_less_than_a_twentieth_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, takes: float, expected: Any
) -> None:
    now = [0.0]

    def save(*_args: Any, **_kwargs: Any) -> None:
        now[0] += takes

    monkeypatch.undo()
    monkeypatch.setattr(training_states.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(training_states.TrainingStates, "_keep", save)
    run = Progress(tmp_path, EventLog(ignore), torch.device("cpu"))
    states = training_states.TrainingStates(run, lambda _: None)
    trainer: Any = type("Trainer", (), {"progress": lambda self: OF_ONE_NUMBER})()
    steps, start = 1000, now[0]
    for _ in range(steps):
        now[0] += 0.01
        states.after_step("it", training_states.Attempt(), trainer)
    saved = round((now[0] - start - steps * 0.01) / takes)
    assert saved in expected


OF_ONE_NUMBER = training_states.Progress(
    steps=1, masters=[torch.ones(1)], moments={}, before={}, after={}, lowest=1.0, kept=0, best=[]
)
