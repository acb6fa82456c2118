"""Reads stored tensors with plain file reads, each byte once and without memory maps.

A memory map would count the source's pages as resident for as long as any tensor of a shard lives, and a weight that
transformers keeps as a view of the map would pin the shard. Reading into fresh memory makes the peak predictable.
"""

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
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
from hcsmoe_hub.machine.allocator import bytes_of, mapped_tensor

# A file was deleted, moved, or lost by a network file system.
LOST = (errno.ENOENT, errno.ESTALE)


class TensorReader:
    """Reads tensors of a source, and counts the bytes.

    Only a few shards are open at the same time, and none of them after its last tensor was read.
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
        # Tensors of each shard that were not read yet; empty until the first one is read.
        self._unread: dict[str, set[str]] = {}
        self._files = OpenFiles()
        self._lock = threading.Lock()
        self.bytes_read = 0

    @contextmanager
    def _open(self, tensor: StoredTensor) -> Iterator[tuple[int, int]]:
        """An open file that holds the tensor's shard from some position on, and that position."""
        found = None if self._feed is None else self._feed.find(tensor.name)
        check = partial(self.source.check_unchanged, tensor.shard)
        files = self._files if self._feed is None or found is None else self._feed.files
        start = 0 if found is None else found[1]
        with ExitStack() as stack:
            try:
                path = self._path(tensor.shard) if found is None else found[0]
                # A piece of a shard has another size.
                file = stack.enter_context(files.reading(path, check) if start == 0 else files.reading(path))
            except OSError as error:
                if error.errno not in LOST or start != 0:
                    raise _gone(tensor.shard, self.source.label, error) from error
                file = stack.enter_context(self._files.reading(self._find_again(tensor.shard, error), check))
            yield file, start

    def _find_again(self, shard: str, error: OSError) -> Path:
        """Path of a shard whose file is no longer where it was, downloaded again if necessary.

        Raises:
            SourceError: If it is gone.
        """
        with self._lock:
            self._paths.pop(shard, None)
        try:
            path = self._path(shard)
            os.stat(path)
        except OSError:
            raise _gone(shard, self.source.label, error) from error
        return path

    def _path(self, shard: str) -> Path:
        with self._lock:
            if shard not in self._paths:
                if not self.source.is_local(shard):
                    shards = self.source.shards
                    self._emit(Fetching(shard, shards.index(shard) + 1, len(shards)))
                self._paths[shard] = self.source.fetch(shard)
            return self._paths[shard]

    def read(self, tensor: StoredTensor, into: Tensor | None = None) -> Tensor:
        """Reads one tensor in its stored dtype.

        Args:
            tensor: What to read.
            into: Where to, contiguous memory of the host of the same shape and dtype; new memory by default.

        Returns:
            The tensor: ``into``, if that is given.

        Raises:
            SourceError: If the shard is gone, has changed, or ends before the tensor does.
        """
        if tensor.nbytes == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype) if into is None else into
        if into is None:
            content, buffer = mapped_tensor(tensor.nbytes)
            into = content.view(tensor.dtype).view(tensor.shape)
        else:
            buffer = bytes_of(into)
        with self._open(tensor) as (file, start):
            _fill(buffer, file, tensor, tensor.offset - start)
            is_last = self._count(tensor)
            if is_last and start == 0:
                # It may have been written to meanwhile.
                self.source.check_unchanged(tensor.shard, file)
        if self._feed is not None:
            self._feed.mark_read(tensor.name)
        if is_last:
            with self._lock:
                path = self._paths.get(tensor.shard)
            if path is not None:
                self._files.close(path)
        return into

    def _count(self, tensor: StoredTensor) -> bool:
        """Counts a tensor that was read; returns whether it was the last one of its shard."""
        with self._lock:
            self.bytes_read += tensor.nbytes
            if not self._unread:
                for stored in self.source.tensors.values():
                    if stored.nbytes:
                        self._unread.setdefault(stored.shard, set()).add(stored.name)
            unread = self._unread.get(tensor.shard, set())
            unread.discard(tensor.name)
            return not unread

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


def _gone(shard: str, label: str, error: OSError) -> SourceError:
    return SourceError(
        f"{shard} of {label} cannot be opened any more: {error.strerror}.",
        hint="bring it back, or mount its folder again, and run the same command again",
    )


def _fill(buffer: memoryview, file: int, tensor: StoredTensor, offset: int) -> None:
    """Fills a buffer with a tensor's bytes, which begin at a position of an open file.

    Raises:
        SourceError: If the file ends before the tensor does, or cannot be read.
    """
    position = 0
    while position < tensor.nbytes:
        try:
            count = os.preadv(file, [buffer[position:]], offset + position)
        except OSError as error:
            raise SourceError(
                f"{tensor.shard} cannot be read: {error.strerror}.",
                hint="check the disk, or mount the network folder again, and run the same command again",
            ) from error
        if count == 0:
            raise SourceError(
                f"{tensor.shard} ends inside tensor {tensor.name!r}; it changed while it was read.",
                hint="download this shard again",
            )
        position += count
