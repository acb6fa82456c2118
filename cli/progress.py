"""Renders the events of a conversion: one live display on a terminal, plain lines elsewhere, nothing when quiet."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import assert_never

import psutil
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from hcsmoe_hub.cli.output import REFRESHES_PER_SECOND, Mode, Output
from hcsmoe_hub.events import (
    Delivered,
    Event,
    Fetching,
    Listener,
    Sending,
    Stage,
    StageAdvanced,
    StageFinished,
    StageResumed,
    StageStarted,
    Warned,
    ignore,
)
from hcsmoe_hub.machine.units import format_bytes, format_plural, format_seconds

BAR_WIDTH = 16
# Stages whose steps are decoder layers.
LAYER_STAGES = frozenset({Stage.OBSERVE, Stage.CONVERT})
# What the steps of other stages are that go on after an interruption.
STEPS = {Stage.REFIT: "step", Stage.TEACHER: "sequence", Stage.RECOVER: "step"}
# Lines of a log about a training.
PARTS = 20
STAGE_WIDTH = max(len(stage) for stage in Stage)


@contextmanager
def listening(output: Output) -> Iterator[Listener]:
    """Yields a listener that shows events as ``output`` allows; the display ends with the context."""
    if output.mode is Mode.QUIET:
        yield ignore
    elif output.is_live:
        view = _LiveView(output)
        with view.progress:
            yield view.listen
    else:
        yield _PlainView(output).listen


def resumed(event: StageResumed, total: int) -> str:
    """Where an interrupted conversion or recovery goes on."""
    steps = STEPS.get(event.stage, "layer")
    return f"Continuing at {steps} {event.done} of {total}." if event.done < total else f"All {steps}s are done."


def delivered(event: Delivered) -> str:
    """How a file came to be on the Hub."""
    size = format_bytes(event.file_bytes)
    return f"{event.file} was there already, {size}" if event.bytes_sent == 0 else f"{event.file} sent, {size}"


class _PlainView:
    """One line when a stage begins, one when it ends: for logs."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._stage = Stage.PLAN
        self._total = self._done = self._shown = 0
        self._bytes_written = 0

    def listen(self, event: Event) -> None:
        match event:
            case StageStarted(stage, total, detail):
                self._stage, self._total, self._done, self._shown = stage, total, 0, 0
                layers = f", {format_plural(total, 'layer')}" if stage in LAYER_STAGES else ""
                self._line(stage, f"started{layers}{detail and f': {detail}'}")
            case StageResumed(stage, done):
                self._done, self._shown = done, done * PARTS // max(1, self._total)
                self._line(stage, resumed(event, self._total))
            case StageAdvanced(stage, detail):
                self._bytes_written = event.bytes_written
                self._done += 1
                # A training may take days.
                if stage is Stage.RECOVER and detail and self._done * PARTS // self._total > self._shown:
                    self._shown = self._done * PARTS // self._total
                    self._line(stage, f"{100 * self._done // self._total} %: {detail}")
            case StageFinished(stage, seconds):
                written = f", {format_bytes(self._bytes_written)} written" if stage is Stage.CONVERT else ""
                self._line(stage, f"done in {format_seconds(seconds)}{written}")
            case Fetching(shard, number, total):
                self._line(self._stage, f"downloading {shard} ({number} of {total})")
            case Delivered():
                self._line(Stage.PUSH, delivered(event))
            case Sending():
                # A log has lines for whole files only.
                pass
            case Warned(message):
                self._output.warn(message)
            case _:
                assert_never(event)

    def _line(self, stage: Stage, text: str) -> None:
        self._output.stderr.print(f"{stage:<{STAGE_WIDTH}}  {text}", soft_wrap=True)


class _LiveView:
    """One display that is redrawn: a line per stage, with layers, bytes, memory and time."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._stage = Stage.PLAN
        self._tasks: dict[Stage, TaskID] = {}
        self.progress = Progress(
            TextColumn(f"{{task.description:<{STAGE_WIDTH}}}"),
            BarColumn(BAR_WIDTH),
            TimeElapsedColumn(),
            _Details(),
            console=output.stderr,
            refresh_per_second=REFRESHES_PER_SECOND,
        )

    def listen(self, event: Event) -> None:
        match event:
            case StageStarted(stage, total, detail):
                if detail:
                    self.progress.console.print(f"{stage}: {detail}", highlight=False, soft_wrap=True)
                # A stage of one step has no progress to show: its bar only pulses.
                known = total if total > 1 else None
                self._stage = stage
                self._tasks[stage] = self.progress.add_task(
                    stage.value,
                    total=known,
                    stage=stage,
                    written=0,
                    seconds=0.0,
                    begun=0,
                    fetching="",
                    sending="",
                    detail="",
                )
            case StageResumed(stage, done):
                task = self.progress.tasks[self._tasks[stage]]
                self.progress.console.print(resumed(event, int(task.total or 1)), highlight=False)
                self.progress.update(task.id, completed=done, begun=done)
            case StageAdvanced(stage, detail):
                seconds = self.progress.tasks[self._tasks[stage]].elapsed
                self.progress.update(
                    self._tasks[stage],
                    advance=1,
                    written=event.bytes_written,
                    seconds=seconds,
                    fetching="",
                    detail=detail,
                )
            case StageFinished(stage):
                steps = self.progress.tasks[self._tasks[stage]].total or 1
                self.progress.update(self._tasks[stage], total=steps, completed=steps)
            case Fetching(shard):
                self.progress.update(self._tasks[self._stage], fetching=shard)
            case Sending(file, file_bytes, bytes_sent):
                # What is sent again after a failure counts once.
                share = min(1.0, bytes_sent / file_bytes)
                self.progress.update(self._tasks[self._stage], sending=f"sending {file} {share:.0%}")
            case Delivered():
                self.progress.update(self._tasks[self._stage], sending="")
            case Warned(message):
                self._output.warn(message)
            case _:
                assert_never(event)


class _Details(ProgressColumn):
    """Layers, bytes written, memory and time left, where a stage has them."""

    def __init__(self) -> None:
        super().__init__()
        self._process = psutil.Process()

    def render(self, task: Task) -> Text:
        stage = task.fields["stage"]
        if stage not in LAYER_STAGES:
            return Text(task.fields["sending"] or _apart(task), no_wrap=True, overflow="ellipsis")
        parts = [f"{task.completed:.0f}/{task.total or 1:.0f} layers"]
        left = None if task.finished else _seconds_left(task)
        if left is not None:
            parts.append(f"{format_seconds(left)} left")
        if stage is Stage.CONVERT:
            parts.append(f"{format_bytes(task.fields['written'])} written")
        if task.fields["fetching"]:
            parts.append(f"downloading {task.fields['fetching']}")
        if task.fields["sending"]:
            parts.append(task.fields["sending"])
        if not task.finished:
            parts.append(f"{format_bytes(self._process.memory_info().rss)} memory")
        return Text(", ".join(parts), no_wrap=True, overflow="ellipsis")


def _apart(task: Task) -> str:
    """Details of a stage whose steps are not layers: of a recovery its score, of a teacher its sequences."""
    parts = [task.fields["detail"]] if task.fields["stage"] is Stage.RECOVER and task.fields["detail"] else []
    if task.fields["stage"] is Stage.TEACHER:
        parts.append(f"{task.completed:.0f}/{task.total or 1:.0f} sequences")
    if task.fields["stage"] in STEPS and not task.finished and (left := _seconds_left(task)) is not None:
        parts.append(f"{format_seconds(left)} left")
    return ", ".join(parts)


def _seconds_left(task: Task) -> float | None:
    """Estimate from the mean time of the layers so far; a layer outlasts rich's moving window of seconds."""
    # Layers of an interrupted run say nothing about the pace of this one.
    begun = task.fields["begun"]
    if task.completed <= begun or task.total is None or task.elapsed is None:
        return None
    layer_seconds: float = task.fields["seconds"] / (task.completed - begun)
    return max(0.0, layer_seconds * (task.total - begun) - task.elapsed)
