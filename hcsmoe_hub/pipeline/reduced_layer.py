"""Runs a decoder layer in its source's form or in that of the result, while the layer is in memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor, nn

from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.model.layer_loader import free
from hcsmoe_hub.observation.observers import RoutedObserver, TiedObserver
from hcsmoe_hub.observation.runnable_block import RunnableBlock
from hcsmoe_hub.observation.statistics import Call
from hcsmoe_hub.pipeline.stream import StreamedLayer

# Runs a layer over all sequences of its batcher.
RunLayer: TypeAlias = Callable[[StreamedLayer, Call], Any]


def run_routed(layer: StreamedLayer, block: RunnableBlock, inputs: Call, observer: RoutedObserver | None = None) -> Any:
    """Runs a layer in which every token visits the experts that the router chooses.

    Args:
        layer: The layer.
        block: Its MoE block.
        inputs: Its inputs.
        observer: What the experts run through; by default as they are.

    Returns:
        What the layer returns.
    """
    observer = observer or RoutedObserver()
    observer.remembers = False
    with block.experts.observing(block.moe, observer):
        return layer.run(inputs)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReducedLayer:
    """A layer in the form of the result.

    Attributes:
        run: Runs it.
        block: Its MoE block, where it has as many router rows as experts and is only a part of the layer.
    """

    run: RunLayer
    block: RunnableBlock | None = None


@contextmanager
def reduced_layer(
    context: LayerContext, changed: Mapping[str, Tensor], labels: Sequence[int]
) -> Iterator[ReducedLayer]:
    """Lets a layer run as it is in the result, inside a ``with`` block.

    Args:
        context: The layer; the weights of its experts need not be in memory any more.
        changed: Tensors of its block in the result, by parameter name.
        labels: Cluster of every source expert.
    """
    if context.result is None:
        with _tied(context, changed):
            yield ReducedLayer(
                run=lambda layer, inputs: run_routed(layer, context.source, inputs, _tied_observer(context, labels))
            )
        return
    with context.reduced(changed) as reduced:
        if reduced.block.is_whole_layer:
            yield ReducedLayer(
                run=lambda layer, inputs: run_routed(replace(layer, module=reduced.moe), reduced, inputs)
            )
        else:
            with _in_place_of(context.source, reduced):
                yield ReducedLayer(run=lambda layer, inputs: run_routed(layer, reduced, inputs), block=reduced)


@contextmanager
def _in_place_of(source: RunnableBlock, reduced: RunnableBlock) -> Iterator[None]:
    """Lets a layer of the source run with the reduced block, inside a ``with`` block."""
    owner, _, name = source.block.path.rpartition(".")
    parent, before = source.skeleton.module.get_submodule(owner), source.moe
    setattr(parent, name, reduced.moe)
    try:
        yield
    finally:
        setattr(parent, name, before)


@contextmanager
def _tied(context: LayerContext, changed: Mapping[str, Tensor]) -> Iterator[None]:
    """Gives the source's block, which keeps its router, the experts of the result, inside a ``with`` block."""
    source = context.source
    for tensor in context.block.experts:
        owner, _, name = tensor.name.rpartition(".")
        value = changed[tensor.name].to(source.device, source.skeleton.dtype)
        parameter = nn.Parameter(value, requires_grad=False)
        source.skeleton.module.get_submodule(owner).register_parameter(name, parameter)
    try:
        yield
    finally:
        free(source.experts.module)


def _tied_observer(context: LayerContext, labels: Sequence[int]) -> RoutedObserver | None:
    """What the experts of a layer run through whose router has more rows than it has experts."""
    clusters = max(labels) + 1
    # In the full layout every row leads to a copy of its own.
    return TiedObserver(labels, clusters) if context.source.experts.num_experts < len(labels) else None
