"""Brings the weights of one decoder layer into the skeleton, and takes them away again."""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from hcsmoe_hub.checkpoint.reader import LazyTensor, TensorReader
from hcsmoe_hub.checkpoint.tensors import StoredTensor
from hcsmoe_hub.checkpoint.writer import ShardWriter
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.model.skeleton import Group, Skeleton


@contextmanager
def sequential_loading() -> Iterator[None]:
    """Lets transformers read tensors one by one instead of a whole layer ahead, which halves the transient memory."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    bars = transformers_logging.is_progress_bar_enabled()
    os.environ[name] = "1"
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
        if bars:
            transformers_logging.enable_progress_bar()


class LayerLoader:
    """Loads groups of stored keys through transformers' own conversions, each byte read once.

    While a key passes, its bytes as stored go to the result if the plan copies them, and are kept if they belong to a
    router: the model may run a tensor in another precision than the source stores it in.

    Args:
        skeleton: The model to fill.
        groups: Its keys by decoder layer.
        reader: Where weights come from.
        writer: Where copied tensors go; ``None`` copies nothing.
        copied: Keys that are copied.
        kept: Parameters whose stored form is kept, by name.
        device: Where layers run; everything outside the layers stays on the CPU.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        groups: Mapping[int | None, Group],
        reader: TensorReader,
        writer: ShardWriter | None,
        *,
        stored: Mapping[str, StoredTensor],
        copied: set[str],
        kept: set[str],
        device: torch.device,
    ) -> None:
        self._skeleton = skeleton
        self._groups = groups
        self._reader = reader
        self._writer = writer
        self._stored = stored
        self._copied = copied
        self._kept = kept
        self._device = device
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

        def on_read(tensor: StoredTensor, content: Tensor) -> None:
            if self._writer is not None and tensor.name in self._copied:
                self._writer.write(tensor.name, content)
            target = group.targets[tensor.name]
            if target in self._kept and tensor.name in group.renamed:
                originals[target] = content

        lazy = {key: LazyTensor(self._stored[key], self._reader, on_read) for key in group.targets}
        skeleton, device = self._skeleton, torch.device("cpu") if layer is None else self._device
        settings = LoadStateDictConfig(
            device_map={"": device},
            dtype=skeleton.dtype,
            dtype_plan=skeleton.module._get_dtype_plan(skeleton.dtype),
            weight_mapping=list[Any](skeleton.mapping()),
            hf_quantizer=skeleton.quantizer,
        )
        info, _ = convert_and_load_state_dict_in_model(skeleton.module, lazy, settings, None)
        problems = [*info.conversion_errors.values(), *info.unexpected_keys, *map(str, info.mismatched_keys)]
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
        """Waits for a decoder layer, loading it now if nobody prefetched it."""
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
