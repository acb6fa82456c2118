"""Brings the weights of one decoder layer into the skeleton, and takes them away again."""

from collections.abc import Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor, nn

from hcsmoe_hub.checkpoint.formats import LogicalTensor
from hcsmoe_hub.checkpoint.lazy_tensor import LazyTensor, OnRead
from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.model.skeleton import Group, Placement, Skeleton
from hcsmoe_hub.model.transformers_seam import load_weights


class LayerLoader:
    """Loads groups of tensors through transformers' own conversions; each byte is read once.

    Tensors of a router are also kept as they are stored: the model may run them in another precision.

    Args:
        skeleton: The model to fill.
        placement: Where its tensors belong.
        reader: Where weights come from.
        device: Where layers run; everything outside the layers stays on the CPU.
        kept: Parameters whose stored form is kept, by name.
        on_read: Called with every tensor, before it is converted.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        placement: Placement,
        reader: TensorReader,
        *,
        device: torch.device,
        kept: Set[str] = frozenset(),
        on_read: OnRead = lambda tensor, parts, values: None,
    ) -> None:
        self._skeleton = skeleton
        self._groups = placement.groups
        self._tensors = placement.tensors
        self._reader = reader
        self._device = device
        self._kept = kept
        self._on_read = on_read
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._pending: dict[int, Future[dict[str, Tensor]]] = {}

    def load(self, layer: int | None) -> dict[str, Tensor]:
        """Loads one group.

        Returns:
            The kept tensors as stored, by parameter name.

        Raises:
            SourceError: If transformers cannot place a tensor.
        """
        group = self._groups.get(layer, Group())
        originals: dict[str, Tensor] = {}

        def on_read(tensor: LogicalTensor, parts: Mapping[str, Tensor], values: Tensor) -> None:
            self._on_read(tensor, parts, values)
            target = group.targets[tensor.name]
            if target in self._kept and tensor.name in group.renamed:
                originals[target] = values

        skeleton, device = self._skeleton, torch.device("cpu") if layer is None else self._device
        lazy = {
            skeleton.in_model(name): LazyTensor(self._tensors[name], self._reader, on_read) for name in group.targets
        }
        problems = load_weights(skeleton.module, lazy, skeleton.dtype, device=device)
        if problems:
            where = "outside the layers" if layer is None else f"of layer {layer}"
            raise SourceError(
                f"transformers cannot load the weights {where}: {problems[0]}", hint="download the checkpoint again"
            )
        if layer is not None and device.type != "cpu":
            move_computed_buffers(skeleton.layers[layer], device)
        return originals

    def prefetch(self, layer: int) -> None:
        """Starts loading a decoder layer in the background."""
        if layer < len(self._skeleton.layers):
            self._pending[layer] = self._pool.submit(self.load, layer)

    def take(self, layer: int) -> dict[str, Tensor]:
        """Waits for a decoder layer, loading it now if it was not prefetched."""
        pending = self._pending.pop(layer, None)
        return self.load(layer) if pending is None else pending.result()

    def settle(self) -> None:
        """Waits until nothing is being loaded: loading and merging at once would add up to a higher peak."""
        wait(self._pending.values())

    def close(self) -> None:
        """Ends the background thread, and the downloads that it may be waiting for."""
        self._reader.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)


def free(module: nn.Module) -> None:
    """Takes the weights of a module away; buffers that are computed instead of stored stay."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                child._buffers[name] = torch.empty_like(buffer, device="meta")


def move_computed_buffers(module: nn.Module, device: torch.device) -> None:
    """Moves the buffers that are computed instead of stored (rotary frequencies) to a device."""
    for child in module.modules():
        for name in child._non_persistent_buffers_set:
            if (buffer := child._buffers[name]) is not None:
                child._buffers[name] = buffer.to(device)
