"""One pass of the model's own forward over the calibration set, with one decoder layer in memory at a time.

The model calls its layers; a hook on each brings the weights, runs the layer, lets a visitor work, and frees them.
Masks, rotary tables and whatever else a layer takes come from the model itself, so hybrids work like the rest.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

from hcsmoe_hub.machine.allocator import return_freed_memory
from hcsmoe_hub.model.layer_loader import LayerLoader, free
from hcsmoe_hub.model.microbatch import MicroBatcher
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.pipeline.merged_stream import MergedStream


class Visitor(ABC):
    """Works on the layers while their weights are in memory."""

    @abstractmethod
    def enter(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A layer's weights have come; its inputs hold all sequences."""

    @abstractmethod
    def start(self, layer: int) -> None:
        """The layer runs from the first sequence on; again if it had to start over with smaller micro-batches."""

    @abstractmethod
    def leave(self, layer: int | None, module: nn.Module, originals: Mapping[str, Tensor]) -> None:
        """A layer has run over all sequences, and its weights are about to go.

        Args:
            layer: Its index; ``None`` for everything outside the layers, once, before the first layer.
            module: Its module.
            originals: Its router tensors as stored, by parameter name.
        """


class _LayerHook(ModelHook):
    """Weights in before the layer, visitor and weights out after it; the next layer is fetched meanwhile."""

    def __init__(self, layer: int, loader: LayerLoader, visitor: Visitor, merged: MergedStream | None) -> None:
        self._layer = layer
        self._loader = loader
        self._visitor = visitor
        self._merged = merged
        self._originals: Mapping[str, Tensor] = {}

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self._originals = self._loader.take(self._layer)
        self._loader.prefetch(self._layer + 1)
        if self._merged is not None:
            args, kwargs = self._merged.split(args, kwargs)
        self._visitor.enter(self._layer, module, args, kwargs)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self._loader.settle()
        return_freed_memory()
        if self._merged is not None:
            self._merged.ran(output)
        self._visitor.leave(self._layer, module, self._originals)
        self._originals = {}
        if self._merged is not None:
            output = self._merged.join()
        free(module)
        return_freed_memory()
        return output


def make_batcher(skeleton: Skeleton, token_ids: Tensor, *, batch_tokens: int, device: torch.device) -> MicroBatcher:
    """Chooses the micro-batch for a calibration set ``[B, S]``."""
    sequences, length = token_ids.shape
    batch = min(sequences, max(1, batch_tokens // length))
    if sequences == length or getattr(skeleton.config, "num_kv_shared_layers", None):
        # Either no tensor can be told to lie along the batch, or layers hand keys and values on: nothing is cut.
        batch = sequences
    return MicroBatcher(sequences, batch, device)


def stream(
    skeleton: Skeleton,
    loader: LayerLoader,
    visitor: Visitor,
    token_ids: Tensor,
    *,
    batcher: MicroBatcher,
    merged: MergedStream | None = None,
) -> None:
    """Runs all calibration tokens through the decoder, layer by layer.

    Args:
        skeleton: The model, without weights.
        loader: Brings the weights of a layer.
        visitor: Works on every layer.
        token_ids: ``[B, S]`` int64.
        batcher: Cuts the sequences into micro-batches.
        merged: The reduced model's hidden states, which the visitor takes through each layer before it leaves.
    """
    model = skeleton.module
    originals = loader.load(None)
    visitor.leave(None, model, originals)
    model.tie_weights()
    for index, layer in enumerate(skeleton.layers):
        layer.forward = batcher.wrap(layer.forward, partial(visitor.start, index))
        add_hook_to_module(layer, _LayerHook(index, loader, visitor, merged))
    with torch.no_grad():
        model.base_model(input_ids=token_ids if merged is None else merged.double(token_ids), use_cache=False)
