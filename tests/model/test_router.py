"""The logits of every router, as they are watched while the model runs.

E experts, T tokens, H features of the router.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import EXPERTS, SUPPORTED, VOCABULARY, inputs_of, save_tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.model.blocks import ExpertTensor, MoEBlock
from hcsmoe_hub.model.router import router_bias, router_weight, watch_logits, watch_router
from hcsmoe_hub.model.source_model import read_model

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(3, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(2))


def routers(model_type: str, folder: Path) -> tuple[PreTrainedModel, list[ExpertTensor]]:
    """A tiny model, and the router matrix of every MoE layer."""
    model = save_tiny(model_type, folder)
    found = read_model(LocalSource(folder))
    weights = [router_weight(block, found.skeleton.state) for block in found.blocks]
    assert None not in weights
    return model, [weight for weight in weights if weight is not None]


def run(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.base_model(**inputs_of(model, IDS))


def watch(model: PreTrainedModel, weight: ExpertTensor) -> tuple[list[Tensor], Callable[[], None]]:
    """What is handed on, and the end of the watch."""
    seen: list[Tensor] = []
    return seen, watch_logits(model, weight, seen.append)


def owner_of(model: PreTrainedModel, weight: ExpertTensor) -> nn.Module:
    """The module whose parameter the router matrix is."""
    return model.get_submodule(weight.name.rpartition(".")[0])


def products(model: PreTrainedModel, weight: ExpertTensor) -> list[Tensor]:
    """``x W^T`` of every run of a router from here on, ``[T, E]``; with the bias where the layer adds one."""
    found: list[Tensor] = []

    def multiply(module: Any, args: tuple[Any, ...]) -> None:
        # A linear layer here would be watched as well.
        product_TE = args[0].reshape(-1, module.weight.shape[1]) @ module.weight.T
        bias = getattr(module, "bias", None)
        found.append((product_TE if bias is None else product_TE + bias)[:, :EXPERTS])

    owner_of(model, weight).register_forward_pre_hook(multiply)
    return found


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_the_watched_logits_are_the_products_of_the_router(model_type: str, tmp_path: Path) -> None:
    model, weights = routers(model_type, tmp_path)
    pairs = [(watch(model, weight)[0], products(model, weight)) for weight in weights]
    run(model)
    for seen, expected in pairs:
        # An encoder and a decoder see half of the tokens each.
        assert [logits.shape for logits in seen] == [(IDS.numel() // (1 + model.config.is_encoder_decoder), EXPERTS)]
        torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", ["zaya", "inkling_text"])
def test_rows_of_no_expert_are_cut_off(model_type: str, tmp_path: Path) -> None:
    model, weights = routers(model_type, tmp_path)
    for weight in weights:
        assert weight.extra_rows == 1
        assert len(owner_of(model, weight).get_parameter("weight")) == EXPERTS + 1


class Router(nn.Module):
    """A linear layer of five rows, of which the last belongs to no expert, next to another one of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
        self.is_broken = False

    def forward(self, states: Tensor) -> Tensor:
        logits = F.linear(states.double(), self.weight.double())
        if self.is_broken:
            raise RuntimeError("broken")
        return F.linear(logits, torch.ones(2, 5, dtype=torch.float64))


class Layer(nn.Module):
    """A router, and a linear layer that could be taken for it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Router()
        self.other = nn.Linear(4, 5)

    def forward(self, states: Tensor) -> Tensor:
        self.other(states)
        return self.gate(states)


WEIGHT = ExpertTensor(name="gate.weight", dim=0, rows_per_expert=1, extra_rows=1)
STATES = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def layer() -> Layer:
    return Layer()


def test_only_the_router_s_own_product_is_handed_on_without_the_extra_rows(layer: Layer) -> None:
    seen: list[Tensor] = []
    watch_logits(layer, WEIGHT, seen.append)
    layer(STATES)
    assert len(seen) == 1
    assert seen[0].shape == (6, 4)
    expected = (STATES.double() @ layer.gate.weight.double().T)[..., :4].reshape(6, 4)
    torch.testing.assert_close(seen[0], expected)


def test_inputs_and_the_logits_of_extra_rows_are_handed_on_too(layer: Layer) -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    watch_router(layer, WEIGHT, lambda *values: seen.append(values))
    layer(STATES)
    ((inputs, logits, extra),) = seen
    assert torch.equal(inputs, STATES.double().reshape(6, 4))
    product = inputs @ layer.gate.weight.double().T
    torch.testing.assert_close(logits, product[:, :4])
    torch.testing.assert_close(extra, product[:, 4:])


def test_the_bias_of_the_matrix_is_none_of_the_others() -> None:
    names = ("gate.e_score_correction_bias", "gate.bias", "gate.weight")
    tensors = [ExpertTensor(name=name, dim=0, rows_per_expert=1, extra_rows=0) for name in names]
    block = MoEBlock(layer=0, path="", experts_path="", experts=(), router=tuple(tensors), tables=())
    assert router_bias(block, tensors[2]) == tensors[1]
    assert router_bias(replace(block, router=(tensors[0], tensors[2])), tensors[2]) is None


def test_every_run_is_handed_on_until_the_watch_ends(layer: Layer) -> None:
    seen: list[Tensor] = []
    stop = watch_logits(layer, WEIGHT, seen.append)
    layer(STATES)
    layer(STATES[:1])
    stop()
    layer(STATES)
    assert [len(logits) for logits in seen] == [6, 3]
    assert not layer.gate._forward_hooks
    assert not layer.gate._forward_pre_hooks


def test_a_failing_router_leaves_no_watch_behind(layer: Layer) -> None:
    seen: list[Tensor] = []
    watch_logits(layer, WEIGHT, seen.append)
    layer.gate.is_broken = True
    with pytest.raises(RuntimeError, match="broken"):
        layer(STATES)
    # A watch that outlived its module would see any product of that shape.
    F.linear(STATES, layer.other.weight)
    assert len(seen) == 1
    layer.gate.is_broken = False
    layer(STATES)
    assert len(seen) == 2


def test_two_routers_are_watched_apart() -> None:
    layers = nn.ModuleList([Layer(), Layer()])
    seen: list[list[Tensor]] = [[], []]
    for number in (0, 1):
        weight = ExpertTensor(name=f"{number}.gate.weight", dim=0, rows_per_expert=1, extra_rows=1)
        watch_logits(layers, weight, seen[number].append)
    layers[1](STATES)
    assert [len(logits) for logits in seen] == [0, 1]


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ({"gate.weight": (6, 4)}, "gate.weight"),
        ({"gate.bias": (6,), "gate.weight": (6, 4)}, "gate.weight"),
        ({"gate.bias": (6,)}, None),
        ({}, None),
        ({"first.weight": (6, 4), "second.weight": (6, 4)}, None),
        ({"keys": (6, 4, 2)}, None),
    ],
)
def test_the_router_s_matrix_is_the_only_one_with_a_row_per_expert(
    shapes: dict[str, tuple[int, ...]], found: str | None
) -> None:
    tensors = tuple(ExpertTensor(name=name, dim=0, rows_per_expert=1, extra_rows=0) for name in shapes)
    block = MoEBlock(layer=0, path="", experts_path="experts", experts=(), router=tensors, tables=())
    weight = router_weight(block, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert (None if weight is None else weight.name) == found
