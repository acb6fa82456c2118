"""Finds out whether a model computes with what a layer returned once the next layer has run.

A conversion that goes on knows only what left the last layer that is done, so such a model cannot be continued.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hcsmoe_hub.model.sequences import encode, run_through
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.pipeline.packing import tensors_in

WHY = "it computes with what earlier layers have returned"


def looks_back(skeleton: Skeleton, output: Any, ids_1S: Tensor, source_length: int = 0) -> bool:
    """Runs the model's own forward with stand-ins for its layers, and traces what depends on which of them.

    Args:
        skeleton: The model; only what lies outside its layers is loaded.
        output: What a layer returns, for any number of sequences.
        ids_1S: ``[1, S]`` int64, the tokens of a sequence.
        source_length: How many of them an encoder reads; what leaves it is kept apart, whatever layers look at it.

    Returns:
        Whether a layer, or the result, depends on anything but the layer before; also where that cannot be traced.
    """
    origins: list[tuple[Tensor, int]] = []
    found = set[int]()

    def stand_in(index: int, *args: Any, **kwargs: Any) -> Any:
        found.update(_origins((args, kwargs), origins) - {index - 1})
        return _traced(output, index, origins)

    def encode_apart(skeleton: Skeleton, ids_1S: Tensor) -> Tensor:
        encoded_1SH = encode(skeleton, ids_1S)
        found.update(_origins(encoded_1SH, origins) - {skeleton.encoder_depth - 1})
        return encoded_1SH.detach()

    with _replaced(skeleton, stand_in), torch.enable_grad():
        try:
            hidden = run_through(skeleton, ids_1S, source_length=source_length, encode=encode_apart)
        except RuntimeError:
            # Something between its layers has no gradient.
            return True
    return bool(found | (_origins(hidden, origins) - {skeleton.depth - 1}))


@contextmanager
def _replaced(skeleton: Skeleton, stand_in: Any) -> Iterator[None]:
    """Lets the model call stand-ins in a ``with`` block, and afterwards what it has called before."""
    before = [vars(module).get("forward") for module in skeleton.layers]
    for index, module in enumerate(skeleton.layers):
        vars(module)["forward"] = partial(stand_in, index)
    try:
        yield
    finally:
        for module, forward in zip(skeleton.layers, before, strict=True):
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward


def _traced(output: Any, index: int, origins: list[tuple[Tensor, int]]) -> Any:
    """What a stand-in returns: of the same kind, for one sequence."""
    if isinstance(output, Tensor):
        shape = (1, *output.shape[1:]) if output.dim() else ()
        made = torch.zeros(shape, dtype=output.dtype)
        if not output.is_floating_point():
            return made
        origins.append((made.requires_grad_(), index))
        # The model may change its copy.
        return made.clone()
    if type(output) in (tuple, list):
        return type(output)(_traced(item, index, origins) for item in output)
    if type(output) is dict:
        return {key: _traced(item, index, origins) for key, item in output.items()}
    return output


def _origins(values: Any, origins: list[tuple[Tensor, int]]) -> set[int]:
    """The layers whose outputs tensors depend on."""
    waiting = [tensor.grad_fn for tensor in tensors_in(values) if tensor.grad_fn is not None]
    seen, found = set[Any](waiting), set[int]()
    while waiting:
        node = waiting.pop()
        origin = getattr(node, "variable", None)
        found.update(index for tensor, index in origins if tensor is origin)
        following = {each for each, _ in node.next_functions if each is not None} - seen
        seen |= following
        waiting += following
    return found
