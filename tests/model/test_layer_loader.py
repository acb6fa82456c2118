"""Layers are loaded with every byte read once, to where it is needed, in the dtype it is stored in."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_models import build
from torch import Tensor

from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.model import layer_loader
from hcsmoe_hub.model.in_place import filled_parameters
from hcsmoe_hub.model.layer_loader import LayerLoader, StoredForm
from hcsmoe_hub.model.source_model import SourceModel, read_model
from hcsmoe_hub.model.transformers_seam import sequential_loading

HOST = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> LocalSource:
    return LocalSource(build(tmp_path_factory.mktemp("source") / "mixtral", dtype=torch.bfloat16))


def experts_of(model: SourceModel) -> set[str]:
    return {tensor.name for block in model.blocks for tensor in block.experts}


@contextmanager
def loading(model: SourceModel, source: LocalSource, *, as_stored: bool) -> Iterator[LayerLoader]:
    experts = experts_of(model) if as_stored else set[str]()
    with sequential_loading(), TensorReader(source) as reader:
        loader = LayerLoader(model.skeleton, model.placement, reader, device=HOST, stored=StoredForm(experts=experts))
        try:
            yield loader
        finally:
            loader.close()


def loaded(source: LocalSource, *, as_stored: bool) -> dict[str, Tensor]:
    model = read_model(source, compute=torch.float32)
    with loading(model, source, as_stored=as_stored) as loader:
        loader.load(1)
    state = model.skeleton.module.state_dict()
    return {name: value for name, value in state.items() if model.skeleton.layer_of(name) == 1}


def test_experts_keep_their_stored_dtype_and_everything_else_has_that_of_the_model(source: LocalSource) -> None:
    names = experts_of(read_model(source))
    for name, value in loaded(source, as_stored=True).items():
        assert value.dtype == (torch.bfloat16 if name in names else torch.float32), name


def test_experts_as_stored_are_those_of_the_model_before_they_are_widened(source: LocalSource) -> None:
    narrow, wide = (loaded(source, as_stored=as_stored) for as_stored in (True, False))
    assert narrow.keys() == wide.keys()
    assert all(torch.equal(narrow[name].float(), wide[name].float()) for name in wide)


def test_experts_that_are_stacked_lie_where_transformers_puts_them(
    source: LocalSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = loaded(source, as_stored=False)
    with monkeypatch.context() as patched:
        patched.setattr(layer_loader, "filled_parameters", lambda *args, **kwargs: {})
        theirs = loaded(source, as_stored=False)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_every_expert_of_a_checkpoint_of_single_experts_is_read_to_its_place(source: LocalSource) -> None:
    model = read_model(source)
    for layer in range(model.skeleton.depth):
        group, experts = model.groups[layer], experts_of(model)
        found = filled_parameters(model.skeleton, group, model.tensors, as_stored=experts)
        assert found.keys() == {name for name in group.targets.values() if name in experts}


def test_a_tensor_too_few_is_left_to_transformers(source: LocalSource) -> None:
    model = read_model(source)
    group = model.groups[0]
    lost = next(iter(group.stacked))
    parameter = group.targets.pop(lost)
    assert parameter not in filled_parameters(model.skeleton, group, model.tensors, as_stored=frozenset())


def test_a_layer_that_does_not_fit_next_to_another_is_loaded_in_its_turn(
    source: LocalSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = read_model(source)
    with loading(model, source, as_stored=True) as loader:
        attempts = failing_for(monkeypatch, loader, times=1)
        loader.prefetch(0)
        loader.take(0)
        assert attempts == ["no memory", "memory"]
        assert not loader.experts_on_host


def test_experts_of_a_layer_that_does_not_fit_alone_stay_on_the_host(
    source: LocalSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = read_model(source)
    with loading(model, source, as_stored=True) as loader:
        failing_for(monkeypatch, loader, times=2)
        loader.prefetch(0)
        loader.take(0)
        assert loader.experts_on_host
    state = model.skeleton.module.state_dict()
    assert all(not state[name].is_meta for name in experts_of(model) if model.skeleton.layer_of(name) == 0)


def failing_for(monkeypatch: pytest.MonkeyPatch, loader: LayerLoader, *, times: int) -> list[str]:
    """Lets a loader take the host for an accelerator whose memory runs out a few times; returns what was tried."""
    attempts: list[str] = []

    def take(filled: object, device: torch.device) -> dict[str, Tensor]:
        attempts.append("no memory" if len(attempts) < times else "memory")
        if attempts[-1] == "no memory":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return memory(filled, device)

    memory = loader._memory
    monkeypatch.setattr(loader, "_memory", take)
    monkeypatch.setattr(layer_loader, "is_host", lambda device: False)
    monkeypatch.setattr(layer_loader, "release_unused", lambda device: None)
    return attempts
