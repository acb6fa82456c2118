"""The raw logits of a router, wherever an architecture computes them.

Routers differ in everything but one step: a linear layer with one row per expert. It is watched while the module that
owns its weight runs; scores, biases and groups come after it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hcsmoe_hub.model.blocks import ExpertTensor, MoEBlock


def router_weight(block: MoEBlock, state: Mapping[str, Tensor]) -> ExpertTensor | None:
    """The matrix ``[experts (+ extra), features]`` that makes the logits; ``None`` if the router has none."""
    found = [tensor for tensor in block.router if tensor.dim == 0 and state[tensor.name].dim() == 2]
    return found[0] if len(found) == 1 else None


def router_bias(block: MoEBlock, weight: ExpertTensor) -> ExpertTensor | None:
    """What the layer of the router's matrix adds to the logits; ``None`` if nothing."""
    name = f"{weight.name.rpartition('.')[0]}.bias"
    return next((tensor for tensor in block.router if tensor.name == name), None)


class _LinearWatch(TorchFunctionMode):
    """Hands on the input and the result of every linear layer whose weight has a given shape."""

    def __init__(self, shape: torch.Size, on_run: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._shape = shape
        self._on_run = on_run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # The weight itself may have been cast on the way, so it is recognised by its shape.
        if func is F.linear and args[1].shape == self._shape:
            self._on_run(args[0], result)
        return result


def watch_logits(model: nn.Module, weight: ExpertTensor, on_logits: Callable[[Tensor], None]) -> Callable[[], None]:
    """Hands the logits ``[T, E]`` of every run of a router to ``on_logits``.

    Args:
        model: The model that holds the router.
        weight: From ``router_weight``.
        on_logits: Called once per run; logits of rows that belong to no expert are cut off.

    Returns:
        A function that ends the watch.
    """
    return watch_router(model, weight, lambda _inputs_TH, logits_TE, _extra_TX: on_logits(logits_TE))


def watch_router(
    model: nn.Module, weight: ExpertTensor, on_run: Callable[[Tensor, Tensor, Tensor], None]
) -> Callable[[], None]:
    """Hands what goes into and what comes out of the matrix of a router to ``on_run``, whenever it runs.

    Args:
        model: The model that holds the router.
        weight: From ``router_weight``.
        on_run: Called once per run with the matrix's input ``[T, H]``, the logits of the experts ``[T, E]``, and those
            of rows that belong to no expert ``[T, X]``.

    Returns:
        A function that ends the watch.
    """
    owner, attribute = model.get_submodule(weight.name.rpartition(".")[0]), weight.name.rpartition(".")[2]
    shape = getattr(owner, attribute).shape
    experts = shape[0] - weight.extra_rows

    def hand_on(inputs: Tensor, logits: Tensor) -> None:
        flat = logits.reshape(-1, shape[0])
        on_run(inputs.reshape(-1, shape[1]), flat[:, :experts], flat[:, experts:])

    watch = _LinearWatch(shape, hand_on)

    def begin(_module: nn.Module, _args: Any) -> None:
        watch.__enter__()

    def end(_module: nn.Module, _args: Any, _result: Any) -> None:
        watch.__exit__(None, None, None)

    hooks = [owner.register_forward_pre_hook(begin), owner.register_forward_hook(end, always_call=True)]

    def stop() -> None:
        for hook in hooks:
            hook.remove()

    return stop
