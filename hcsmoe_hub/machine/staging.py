"""Copies between the host and an accelerator that run while it computes.

A device without streams of its own copies at once; so does the host, where there is nothing to copy.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from hcsmoe_hub.machine.accelerator import is_host, streams


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arriving:
    """Tensors on their way to a device.

    Attributes:
        values: The tensors there, inside tuples, lists and dicts.
        event: Passes when the copies are complete; ``None`` if they are.
    """

    values: Any
    event: Any = None


class Staging:
    """Copies to and from one device, on a stream of their own where the device has streams.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module = streams(device)
        self._stream = None if self._module is None else self._module.Stream(device)

    @property
    def is_pinned(self) -> bool:
        """Whether host memory is pinned, so that copies need not wait for each other."""
        return self._stream is not None

    def send(self, values: Any) -> Arriving:
        """Begins to copy tensors to the device.

        Args:
            values: Tensors on the host or on the device, inside tuples, lists and dicts.
        """
        if self._stream is None:
            return Arriving(values=values if is_host(self.device) else send_to_device(values, self.device))
        with self._copying():
            placed = send_to_device(values, self.device, non_blocking=True)
            return Arriving(values=placed, event=self._stream.record_event())

    def receive(self, arriving: Arriving) -> Any:
        """The tensors on the device; what is computed there next waits for them, the process does not."""
        if arriving.event is not None and self._module is not None:
            current = self._module.current_stream(self.device)
            current.wait_event(arriving.event)
            _used_on(arriving.values, current)
        return arriving.values

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, home: torch.device) -> Tensor:
        """Memory for tensors of a device or the host; pinned on the host where that speeds up copies."""
        return torch.empty(shape, dtype=dtype, device=home, pin_memory=is_host(home) and self.is_pinned)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copies between the device and the host, or within either; call ``settle`` before the host reads it."""
        if self._stream is None or target.device == source.device:
            target.copy_(source)
            return
        assert self._module is not None, "streams belong to a module"
        self._stream.wait_stream(self._module.current_stream(self.device))
        with self._copying():
            target.copy_(source, non_blocking=True)
        if not is_host(source.device):
            source.record_stream(self._stream)

    def bring(self, value: Tensor, home: torch.device) -> Tensor:
        """A tensor on the device or on the host; itself if it is there. Call ``settle`` before the host reads it."""
        if value.device == home:
            return value
        placed = self.empty(tuple(value.shape), value.dtype, home)
        self.copy(placed, value)
        return placed

    def settle(self) -> None:
        """Waits until everything is copied."""
        if self._stream is not None:
            self._stream.synchronize()

    def _copying(self) -> Any:
        return nullcontext() if self._module is None else self._module.stream(self._stream)


def _used_on(values: Any, stream: Any) -> None:
    """Keeps the memory of tensors until a stream is done with them."""
    if isinstance(values, Tensor):
        if not is_host(values.device):
            values.record_stream(stream)
    elif isinstance(values, (tuple, list)):
        for value in values:
            _used_on(value, stream)
    elif isinstance(values, dict):
        for value in values.values():
            _used_on(value, stream)
