"""Moves weights between files and an accelerator while it computes: through pinned buffers, on streams of their own.

A device without streams copies at once. On the host there is nothing to copy.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hcsmoe_hub.machine.accelerator import is_host, streams
from hcsmoe_hub.machine.allocator import bytes_of, mapped_tensor

# Two buffers of this size per direction: one is filled while the other is copied.
BUFFER_BYTES = 32_000_000
BUFFERS = 2


class _Stream:
    """A stream of a device, and pinned buffers that are copied from or to on it.

    Args:
        device: The device.
        module: What torch offers for its streams.
    """

    def __init__(self, device: torch.device, module: Any) -> None:
        self.module = module
        self.stream = self.module.Stream(device)
        self._device = device
        self._buffers: list[Tensor] = []
        self._events: list[Any] = [None] * BUFFERS
        self._next = 0

    def after_all(self) -> None:
        """Lets the stream wait for all that has been started: memory that was freed may still be in use there."""
        self.stream.wait_stream(self.module.current_stream(self._device))

    def buffer(self, nbytes: int) -> tuple[int, Tensor]:
        """The next buffer and its number, once nothing is copied from it any more."""
        if not self._buffers:
            self._buffers = [torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(BUFFERS)]
        number, self._next = self._next, (self._next + 1) % BUFFERS
        if self._events[number] is not None:
            self._events[number].synchronize()
        return number, self._buffers[number][:nbytes]

    def copy(self, target: Tensor, source: Tensor, number: int) -> Any:
        """Copies to or from a buffer on the stream; returns the event that passes afterwards."""
        with self.module.stream(self.stream):
            target.copy_(source, non_blocking=True)
            self._events[number] = self.stream.record_event()
        return self._events[number]


def _stream_of(device: torch.device) -> _Stream | None:
    module = streams(device)
    return None if module is None else _Stream(device, module)


class Upload:
    """Copies weights to a device; used by one thread.

    Args:
        device: Where to.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = _stream_of(device)

    def empty_on_host(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Memory of the host from which the device copies directly, if it can."""
        if self._stream is not None:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        return empty_on_host(shape, dtype)

    def begin(self) -> None:
        """Lets copies wait for what is being computed: call it when the memory to copy to has been reserved."""
        if self._stream is not None:
            self._stream.after_all()

    def copy(self, target: Tensor, values: Tensor) -> None:
        """Copies values to the device, or to other memory of the host; ``settle`` waits for it.

        Args:
            target: Where to; may have another dtype.
            values: On the host; free again when this returns.
        """
        if self._stream is None or is_host(target.device) or not target.is_contiguous():
            target.copy_(values)
            return
        count = BUFFER_BYTES // values.dtype.itemsize
        for place, part in zip(target.view(-1).split(count), values.reshape(-1).split(count), strict=True):
            number, buffer = self._stream.buffer(part.nbytes)
            staged = buffer.view(part.dtype)
            staged.copy_(part)
            self._stream.copy(place, staged, number)

    def settle(self) -> None:
        """Waits until everything is there."""
        if self._stream is not None:
            self._stream.stream.synchronize()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Leaving:
    """A tensor that is to be copied to the host later, by another thread.

    Attributes:
        values: The tensor; it must not change until then.
        event: Passes when it is computed; ``None`` where that needs no waiting.
    """

    values: Tensor
    event: Any = None


class Download:
    """Copies results to the host; used by one thread, but for ``mark``.

    Args:
        device: Where from.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = _stream_of(device)

    def mark(self, values: Tensor) -> Leaving:
        """Notes how far the device has to come until a tensor is computed."""
        if self._stream is None or is_host(values.device):
            return Leaving(values=values)
        event = self._stream.module.current_stream(values.device).record_event()
        return Leaving(values=values, event=event)

    def write(self, leaving: Leaving, write: Callable[[memoryview, int], None]) -> None:
        """Hands the bytes of a tensor to a function, piece by piece.

        Args:
            leaving: The tensor.
            write: Called with bytes and their position among those of the tensor; they change afterwards.
        """
        values = leaving.values.detach()
        if values.numel() == 0:
            return
        if self._stream is None or leaving.event is None:
            write(bytes_of(values.to("cpu").contiguous()), 0)
            return
        self._stream.stream.wait_event(leaving.event)
        if not values.is_contiguous():
            values = values.contiguous()
            self._stream.after_all()
        for position, buffer in self._pieces(values.view(-1).view(torch.uint8), self._stream):
            write(bytes_of(buffer), position)

    @staticmethod
    def _pieces(content: Tensor, stream: _Stream) -> Iterator[tuple[int, Tensor]]:
        """Pieces of a tensor on the host: while one is used, the next one is copied."""
        ready: tuple[int, Tensor, Any] | None = None
        for start in range(0, len(content), BUFFER_BYTES):
            part = content[start : start + BUFFER_BYTES]
            number, buffer = stream.buffer(len(part))
            event = stream.copy(buffer, part, number)
            if ready is not None:
                ready[2].synchronize()
                yield ready[:2]
            ready = (start, buffer, event)
        if ready is not None:
            ready[2].synchronize()
            yield ready[:2]


def empty_on_host(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Memory of the host that is returned to the system with its last tensor."""
    nbytes = shape.numel() * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    return mapped_tensor(nbytes)[0].view(dtype).view(shape)
