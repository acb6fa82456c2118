"""Reads stored tensors with plain file reads, each byte once and without memory maps.

A memory map would count the source's pages as resident for as long as any tensor of a shard lives, and a weight that
transformers keeps as a view of the map would pin the shard. Reading into fresh memory makes the peak predictable.
"""

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from hcsmoe_hub.checkpoint.feed import Feed
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.checkpoint.tensors import DTYPE_NAMES, StoredTensor
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.events import Fetching, Listener, ignore
from hcsmoe_hub.machine.allocator import mapped_tensor


class TensorReader:
    """Reads tensors of a source; keeps one open file per shard and counts the bytes.

    Safe to use from several threads: ``os.preadv`` has no shared position.

    Args:
        source: What to read.
        feed: Downloads ahead of this reader; shards that it does not contain are fetched when they are needed.
        emit: Called with such downloads.
    """

    def __init__(self, source: Source, *, feed: Feed | None = None, emit: Listener = ignore) -> None:
        self.source = source
        self._feed = feed
        self._emit = emit
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        self.bytes_read = 0

    def _open(self, tensor: StoredTensor) -> tuple[int, int]:
        """An open file that holds the tensor's shard from some position on, and that position."""
        found = None if self._feed is None else self._feed.open(tensor.name)
        return (self._file(tensor.shard), 0) if found is None else found

    def _file(self, shard: str) -> int:
        with self._lock:
            if shard not in self._files:
                if not self.source.is_local(shard):
                    shards = self.source.shards
                    self._emit(Fetching(shard, shards.index(shard) + 1, len(shards)))
                self._files[shard] = os.open(self.source.fetch(shard), os.O_RDONLY)
            return self._files[shard]

    def read(self, tensor: StoredTensor) -> Tensor:
        """Reads one tensor into new memory, in its stored dtype.

        Raises:
            SourceError: If the file ends before the tensor does.
        """
        if tensor.nbytes == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        content, buffer = mapped_tensor(tensor.nbytes)
        file, start = self._open(tensor)
        position = 0
        while position < tensor.nbytes:
            count = os.preadv(file, [buffer[position:]], tensor.offset - start + position)
            if count == 0:
                raise SourceError(
                    f"{tensor.shard} ends inside tensor {tensor.name!r}; it changed while it was read.",
                    hint="download this shard again",
                )
            position += count
        if self._feed is not None:
            self._feed.mark_read(tensor.name)
        with self._lock:
            self.bytes_read += tensor.nbytes
        return content.view(tensor.dtype).view(tensor.shape)

    def stop(self) -> None:
        """Ends downloads that other threads may be waiting for."""
        if self._feed is not None:
            self._feed.stop()

    def close(self) -> None:
        """Closes every open shard."""
        with self._lock:
            for file in self._files.values():
                os.close(file)
            self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LazyTensor:
    """A stored tensor that transformers' loader reads when, and only when, it indexes it.

    Args:
        tensor: What to read.
        reader: Where to read it.
        on_read: Called with the tensor as stored, before any conversion or cast.
    """

    def __init__(
        self, tensor: StoredTensor, reader: TensorReader, on_read: Callable[[StoredTensor, Tensor], None]
    ) -> None:
        self.tensor = tensor
        self._reader = reader
        self._on_read = on_read

    def __getitem__(self, index: object) -> Tensor:
        assert index is Ellipsis, "transformers reads whole tensors"
        content = self._reader.read(self.tensor)
        self._on_read(self.tensor, content)
        return content

    def get_dtype(self) -> str:
        """Dtype name, as transformers' quantisers ask a safetensors slice for it."""
        return DTYPE_NAMES[self.tensor.dtype]
