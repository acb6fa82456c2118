"""Reads stored tensors with plain file reads, each byte once and without memory maps.

A memory map would count the source's pages as resident for as long as any tensor of a shard lives, and a weight that
transformers keeps as a view of the map would pin the shard. Reading into fresh memory makes the peak predictable.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from hcsmoe_hub.checkpoint.feed import Feed
from hcsmoe_hub.checkpoint.open_files import OpenFiles
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.checkpoint.tensors import StoredTensor
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.events import Fetching, Listener, ignore
from hcsmoe_hub.machine.allocator import mapped_tensor


class TensorReader:
    """Reads tensors of a source; keeps only a few shards open, and counts the bytes.

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
        self._paths: dict[str, Path] = {}
        self._files = OpenFiles()
        self._lock = threading.Lock()
        self.bytes_read = 0

    @contextmanager
    def _open(self, tensor: StoredTensor) -> Iterator[tuple[int, int]]:
        """An open file that holds the tensor's shard from some position on, and that position."""
        found = None if self._feed is None else self._feed.find(tensor.name)
        if self._feed is not None and found is not None:
            path, start = found
            with self._feed.files.reading(path) as file:
                yield file, start
        else:
            with self._files.reading(self._path(tensor.shard)) as file:
                yield file, 0

    def _path(self, shard: str) -> Path:
        with self._lock:
            if shard not in self._paths:
                if not self.source.is_local(shard):
                    shards = self.source.shards
                    self._emit(Fetching(shard, shards.index(shard) + 1, len(shards)))
                self._paths[shard] = self.source.fetch(shard)
            return self._paths[shard]

    def read(self, tensor: StoredTensor) -> Tensor:
        """Reads one tensor into new memory, in its stored dtype.

        Raises:
            SourceError: If the file ends before the tensor does.
        """
        if tensor.nbytes == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        content, buffer = mapped_tensor(tensor.nbytes)
        with self._open(tensor) as (file, start):
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
        self._files.close_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
