"""How events are shown: redrawn on a terminal, plain lines elsewhere, nothing when quiet."""

import io
import re

import pytest
from rich.console import Console
from rich.progress import Progress

from hcsmoe_hub.cli.output import Output
from hcsmoe_hub.cli.progress import listening
from hcsmoe_hub.events import (
    Delivered,
    Fetching,
    Sending,
    Stage,
    StageAdvanced,
    StageFinished,
    StageResumed,
    StageStarted,
    Warned,
)

EVENTS = [
    StageStarted(Stage.CALIBRATION, 1),
    StageFinished(Stage.CALIBRATION, 0.5),
    StageStarted(Stage.CONVERT, 2),
    StageAdvanced(Stage.CONVERT, "layer 0", 1_500_000),
    Warned("layer 0: something [odd]."),
    StageAdvanced(Stage.CONVERT, "layer 1", 3_000_000),
    StageFinished(Stage.CONVERT, 400),
]


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self):
        return True


OBSERVING = [
    StageStarted(Stage.OBSERVE, 2),
    Fetching("model-2.safetensors", 2, 3),
    StageAdvanced(Stage.OBSERVE, "layer 0"),
    StageAdvanced(Stage.OBSERVE, "layer 1"),
    StageFinished(Stage.OBSERVE, 5),
]


# Shards are sent while the next ones are made, and after the last one.
PUSHING = [
    StageStarted(Stage.CONVERT, 2),
    Sending("model-1.safetensors", 4_000_000, 1_000_000),
    StageAdvanced(Stage.CONVERT, "layer 0", 4_000_000),
    Delivered("model-1.safetensors", 4_000_000, 4_000_000),
    StageAdvanced(Stage.CONVERT, "layer 1", 6_000_000),
    StageFinished(Stage.CONVERT, 7),
    StageStarted(Stage.PUSH, 1),
    # Half of it was sent twice.
    Sending("model-2.safetensors", 2_000_000, 3_000_000),
    Delivered("model-2.safetensors", 2_000_000, 0),
    StageFinished(Stage.PUSH, 2),
]


def shown(output, file, *, width=100, events=EVENTS):
    """Sends all events; returns what was printed, without colours and cursor movements."""
    output.stderr = Console(file=file, force_terminal=file.isatty(), width=width, markup=False, highlight=False)
    with listening(output) as listener:
        for event in events:
            listener(event)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())


def test_plain_lines_say_when_a_stage_starts_and_ends():
    assert shown(Output(), io.StringIO()).splitlines() == [
        "calibration  started",
        "calibration  done in 0.5 s",
        "convert      started, 2 layers",
        "Warning: layer 0: something [odd].",
        "convert      done in 6 min 40 s, 3.0 MB written",
    ]


RECOVERING = [
    StageStarted(Stage.TEACHER, 4, "up to 2.0 MB of logits go to logits"),
    StageResumed(Stage.TEACHER, 2),
    StageAdvanced(Stage.TEACHER),
    StageAdvanced(Stage.TEACHER),
    StageFinished(Stage.TEACHER, 3),
    StageStarted(Stage.RECOVER, 200),
    StageResumed(Stage.RECOVER, 190),
    *(StageAdvanced(Stage.RECOVER, f"step {step}, perplexity 12.5") for step in range(191, 201)),
    StageFinished(Stage.RECOVER, 60),
]


def test_a_log_of_a_training_has_a_line_for_each_twentieth_of_it():
    assert shown(Output(), io.StringIO(), events=RECOVERING).splitlines() == [
        "teacher      started: up to 2.0 MB of logits go to logits",
        "teacher      Continuing at sequence 2 of 4.",
        "teacher      done in 3.0 s",
        "recover      started",
        "recover      Continuing at step 190 of 200.",
        "recover      100 %: step 200, perplexity 12.5",
        "recover      done in 1 min 0 s",
    ]


def test_a_terminal_shows_the_score_of_a_training(drawing_everything):
    text = shown(Output(), Terminal(), events=RECOVERING)
    assert "teacher: up to 2.0 MB of logits go to logits" in text
    assert "4/4 sequences" in text
    assert "step 200, perplexity 12.5" in text


@pytest.fixture
def drawing_everything(monkeypatch):
    """Draws after every event instead of four times a second."""
    update = Progress.update

    def update_and_draw(self, task_id, **fields):
        update(self, task_id, **fields)
        self.refresh()

    monkeypatch.setattr(Progress, "update", update_and_draw)


def test_observing_counts_layers_and_downloads_but_no_bytes():
    assert shown(Output(), io.StringIO(), events=OBSERVING).splitlines() == [
        "observe      started, 2 layers",
        "observe      downloading model-2.safetensors (2 of 3)",
        "observe      done in 5.0 s",
    ]


def test_terminal_shows_observed_layers():
    text = shown(Output(), Terminal(), events=OBSERVING)
    assert "2/2 layers" in text
    assert "written" not in text


def test_plain_lines_say_what_came_to_the_hub():
    assert shown(Output(), io.StringIO(), events=PUSHING).splitlines() == [
        "convert      started, 2 layers",
        "push         model-1.safetensors sent, 4.0 MB",
        "convert      done in 7.0 s, 6.0 MB written",
        "push         started",
        "push         model-2.safetensors was there already, 2.0 MB",
        "push         done in 2.0 s",
    ]


def test_terminal_shows_how_much_of_a_shard_was_sent(drawing_everything):
    text = shown(Output(), Terminal(), width=120, events=PUSHING)
    assert "0/2 layers, 0 bytes written, sending model-1.safetensors 25%" in text.replace("0 B ", "0 bytes ")
    assert "sending model-2.safetensors 100%" in text
    assert "150%" not in text


@pytest.mark.parametrize("width", [40, 80, 100])
def test_terminal_shows_one_line_per_stage_at_the_end(width):
    last = shown(Output(), Terminal(), width=width).replace("\r", "\n").rstrip().splitlines()[-2:]
    assert [line.split()[0] for line in last] == ["calibration", "convert"]
    assert all(len(line) <= width for line in last)


def test_terminal_shows_layers_bytes_memory_and_time(drawing_everything):
    text = shown(Output(), Terminal())
    assert re.search(r"convert +\S+ 0:00:\d\d 1/2 layers, \d+\.\d s left, 1\.5 MB written, \S+ [MG]B memory", text)
    assert "2/2 layers, 3.0 MB written" in text


def test_terminal_shows_warnings_above_the_display():
    assert "Warning: layer 0: something [odd].\n" in shown(Output(), Terminal())


def test_json_leaves_progress_on_stderr():
    assert "convert" in shown(Output(as_json=True), io.StringIO())


@pytest.mark.parametrize("file", [io.StringIO, Terminal])
def test_quiet_shows_nothing(file):
    assert shown(Output(quiet=True), file()) == ""


def test_forced_colours_do_not_redraw_lines_in_a_log(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    output, file = Output(), io.StringIO()
    output.stderr = Console(file=file)
    assert output.stderr.is_terminal
    assert not output.is_live
