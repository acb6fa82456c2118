"""Layers that change what they are given: their conversion ends as usual, and goes on where that is safe."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import at_layer, comparable, go_on, interrupt, undisturbed
from tiny_models import build, options
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from hcsmoe_hub import convert
from hcsmoe_hub.events import Event, EventLog, Stage, Warned, ignore
from hcsmoe_hub.pipeline import progress as progress_module
from hcsmoe_hub.pipeline.given_tensors import GivenTensors
from hcsmoe_hub.pipeline.progress import Progress

LAYERS = 4
PATIENCE_SECONDS = 10


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build(tmp_path / "model", num_hidden_layers=LAYERS)


def change_inputs(monkeypatch: pytest.MonkeyPatch, first: int = 0, changed: Callable[[], None] = lambda: None) -> None:
    """Lets decoder layers write their output to their input, beginning with one of them."""
    forward = MixtralDecoderLayer.forward

    def in_place(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = forward(self, hidden_states, *args, **kwargs)
        if self.self_attn.layer_idx < first:
            return output
        hidden_states.copy_(output)
        changed()
        return hidden_states

    monkeypatch.setattr(MixtralDecoderLayer, "forward", in_place)


@pytest.mark.parametrize("layer", [1, 3])
def test_a_model_whose_layers_change_their_input_goes_on_to_the_same_bytes(
    source: Path, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    change_inputs(monkeypatch)
    wanted = options(source, 4)
    interrupt(source, wanted, at_layer(layer))
    assert go_on(source, wanted) == {Stage.CONVERT: layer}
    assert comparable(source.parent / "result") == undisturbed(source, wanted)


def test_what_changes_while_it_is_written_is_not_gone_on_from(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed, write = threading.Event(), progress_module.write_state

    def slow(path: Path, *args: Any) -> str:
        if path.name == "convert-1.states-0":
            assert changed.wait(PATIENCE_SECONDS)
        return write(path, *args)

    # Layers of this kind have left their inputs alone so far.
    change_inputs(monkeypatch, 2, changed.set)
    monkeypatch.setattr(progress_module, "write_state", slow)
    wanted = options(source, 4)
    interrupt(source, wanted, at_layer(2))
    assert not list((source.parent / "result").rglob("convert-1.states-*"))
    assert go_on(source, wanted) == {Stage.CONVERT: 1}
    assert comparable(source.parent / "result") == undisturbed(source, wanted)


def test_a_layer_is_trusted_with_its_input_once_one_of_its_kind_has_left_it_alone() -> None:
    given, linear, values = GivenTensors(), nn.Linear(2, 2), torch.zeros(2)
    assert given.may_change(linear, {"inputs": [values]})
    given.learn()
    assert not given.may_change(nn.Linear(3, 3), (values,))
    assert given.may_change(nn.ReLU(), (values,))
    assert not given.may_change(linear, (values,))
    values.add_(1)
    given.learn()
    assert given.may_change(linear, (values,))
    given.learn()
    # Once is enough.
    assert given.may_change(linear, (values,))


def test_a_layer_that_returns_what_no_file_holds_ends_in_a_warning_and_the_same_bytes(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = options(source, 4)
    expected, messages = undisturbed(source, wanted), list[str]()
    pack = Progress.pack

    def refuse(self: Progress, value: Any) -> Any:
        return pack(self, {**value, "odd": object()} if "outputs" in value else value)

    def listen(event: Event) -> None:
        if isinstance(event, Warned):
            messages.append(event.message)

    monkeypatch.setattr(Progress, "pack", refuse)
    convert(source, wanted, listener=listen)
    (message,) = [message for message in messages if "cannot be continued" in message]
    assert message.endswith("layer 0 returns an object of the class object.")
    found = comparable(source.parent / "result")
    assert [name for name in expected if name.endswith(".safetensors") and found[name] != expected[name]] == []


def test_a_step_that_no_file_holds_is_made_all_the_same(tmp_path: Path) -> None:
    messages = list[str]()
    log = EventLog(lambda event: messages.append(event.message) if isinstance(event, Warned) else ignore(event))
    progress = Progress(tmp_path, log, torch.device("cpu"))
    made = {"values": torch.zeros(2, dtype=torch.complex128)}
    assert progress.once("calibration", lambda: made) is made
    assert not progress.is_kept
    assert messages == [
        "an interrupted conversion of this model cannot be continued: what is kept of the calibration holds a tensor "
        "of torch.complex128 and torch.strided."
    ]
