"""Writes the planned shards layer by layer, without holding a shard in memory.

The plan knows every name, dtype and shape beforehand, so each shard's header is written first and each tensor goes
straight to its own position in the file. (safetensors itself can only save a shard that is complete in memory.)
It writes to a folder that nobody takes for a checkpoint: until the result is complete, its shards have holes.
"""

import hashlib
import json
import os
import struct
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from hcsmoe_hub.checkpoint.durable import naming, sync_folder, write_json
from hcsmoe_hub.checkpoint.tensors import DTYPE_NAMES, INDEX_FILE, StoredTensor, total_bytes
from hcsmoe_hub.errors import OutputError
from hcsmoe_hub.machine.allocator import bytes_of

# Bytes that are read at once to compare them with their digest.
_READ_BYTES = 1 << 23

# Writes bytes to a position among those of a tensor.
Write: TypeAlias = Callable[[memoryview, int], None]
# Hands the bytes of a tensor to such a function.
Pieces: TypeAlias = Callable[[Write], None]


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Position of every tensor in the shards of the result.

    Attributes:
        files: Shard name to its tensors, in the order of their bytes.
        headers: Shard name to the bytes before its first tensor.
    """

    files: Mapping[str, tuple[StoredTensor, ...]]
    headers: Mapping[str, bytes]

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Tensor name to its position."""
        return {tensor.name: tensor for shard in self.files.values() for tensor in shard}

    @property
    def file_bytes(self) -> int:
        """Total size of all shards in bytes, headers included."""
        return sum(len(header) for header in self.headers.values()) + total_bytes(self.tensors.values())


def lay_out(outputs: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], *, max_shard_size: str) -> ShardLayout:
    """Plans shards for ``(name, dtype, shape)`` triples, filled in the given order.

    Args:
        outputs: Tensors of the result.
        max_shard_size: Maximum size of a shard, such as ``5GB``; a larger tensor gets a shard of its own.
    """
    specs = {
        name: StoredTensor(name=name, dtype=dtype, shape=shape, shard="", offset=0) for name, dtype, shape in outputs
    }
    split = split_state_dict_into_shards_factory(
        specs,
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    shards, headers = {}, {}
    for shard, names in split.filename_to_tensors.items():
        # Widest dtypes first keeps every tensor aligned to its element size, as safetensors' own writer does.
        ordered = sorted((specs[name] for name in names), key=lambda spec: -spec.dtype.itemsize)
        headers[shard], shards[shard] = _encode(shard, ordered)
    return ShardLayout(files=shards, headers=headers)


def _encode(shard: str, specs: Sequence[StoredTensor]) -> tuple[bytes, tuple[StoredTensor, ...]]:
    """Header bytes of a shard, and its tensors with their final offsets."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in specs:
        offsets = [position, position + spec.nbytes]
        entries[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": spec.header_shape, "data_offsets": offsets}
        position += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    placed = tuple(
        StoredTensor(
            name=spec.name,
            dtype=spec.dtype,
            shape=spec.shape,
            shard=shard,
            offset=len(header) + entries[spec.name]["data_offsets"][0],
        )
        for spec in specs
    )
    return header, placed


class Recipient(Protocol):
    """Receives each shard when it is complete."""

    def wait_for_space(self) -> None:
        """Called before each tensor is written; may block."""
        ...

    def take(self, shard: Path) -> None:
        """Called with each finished shard."""
        ...


class ShardWriter:
    """Writes tensors to their planned positions, from any thread and in any order.

    Args:
        folder: Folder of the shards.
        layout: Position of every tensor.
        recipient: Receives the finished shards.
        keeps_digests: Whether ``sync`` returns digests of what was written.
    """

    def __init__(
        self, folder: Path, layout: ShardLayout, recipient: Recipient | None = None, *, keeps_digests: bool = False
    ) -> None:
        self._folder = folder
        self._layout = layout
        self._recipient = recipient
        self._keeps_digests = keeps_digests
        self._tensors = layout.tensors
        self._missing = {shard: {tensor.name for tensor in tensors} for shard, tensors in layout.files.items()}
        self._restored = set[str]()
        self._digests: dict[str, str] = {}
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        self.bytes_written = 0

    def restore(
        self, digests: Mapping[str, str], *, sent: Collection[str] = (), replaced: Collection[str] = ()
    ) -> None:
        """Takes over what an interrupted conversion has written: these tensors are not written again.

        Complete shards are handed to the recipient, but for those that it already has.

        Args:
            digests: SHA-256 of their bytes by name, as ``sync`` returned them.
            sent: Names of shards that the recipient had received whole, and that are no longer in the folder.
            replaced: Names of tensors that have been, or are going to be, written over; they are not compared.

        Raises:
            OutputError: If a tensor is not what was written.
        """
        names = {name for name in digests if self._tensors[name].shard not in sent}
        self._check(sorted(names.difference(replaced)), digests)
        names |= {tensor.name for shard in sent for tensor in self._layout.files[shard]}
        self._restored |= names
        self.bytes_written += total_bytes(self._tensors[name] for name in names)
        for shard, missing in self._missing.items():
            was_missing = bool(missing)
            missing -= names
            if was_missing and not missing and shard not in sent:
                self._publish(shard)

    def _check(self, names: Sequence[str], digests: Mapping[str, str]) -> None:
        for name in names:
            if _stored_digest(self._folder, self._tensors[name]) != digests[name]:
                raise OutputError(
                    f"{self._folder / self._tensors[name].shard} was changed after the conversion was interrupted: "
                    f"tensor {name!r} is not what was written.",
                    hint="add `restart=True` to begin anew",
                )

    def wait_for_space(self) -> None:
        """Waits until the recipient has room for another tensor."""
        if self._recipient is not None:
            self._recipient.wait_for_space()

    def write(self, name: str, tensor: Tensor, pieces: Pieces | None = None) -> None:
        """Writes one tensor, unless it was restored; its shard is handed on with its last tensor.

        Args:
            name: Its name.
            tensor: The tensor.
            pieces: Brings its bytes to the host, first to last; by default all at once.

        Raises:
            AssertionError: If the tensor differs from the plan or was written before, a defect of the caller.
        """
        if name in self._restored:
            return
        self.wait_for_space()
        planned = self._tensors[name]
        assert name in self._missing[planned.shard], f"{name} was written before"
        assert (tensor.dtype, tensor.shape) == (planned.dtype, planned.shape), (name, tensor.dtype, tensor.shape)
        digest = hashlib.sha256() if self._keeps_digests else None
        with naming(self._folder / planned.shard):
            _write_at(self._file(planned.shard), planned, pieces or _all_of(tensor), digest)
        with self._lock:
            if digest is not None:
                self._digests[name] = digest.hexdigest()
            self._note(planned)

    def _note(self, written: StoredTensor) -> None:
        """Notes that a tensor is written; hands its shard on if it was the last one."""
        self.bytes_written += written.nbytes
        self._missing[written.shard].remove(written.name)
        if not self._missing[written.shard]:
            self._close(written.shard)
            self._publish(written.shard)

    def share(self) -> None:
        """Called where all ranks have written what they write of a layer; a single writer hands on right away."""

    def sync(self) -> dict[str, str]:
        """Waits until everything written so far is on the disk.

        Returns:
            SHA-256 of the bytes of every tensor that was written here since the last call, by name; empty unless
            digests are kept.
        """
        with self._lock:
            digests, self._digests = self._digests, {}
            for shard, file in self._files.items():
                with naming(self._folder / shard):
                    os.fsync(file)
        sync_folder(self._folder)
        return digests

    def _file(self, shard: str) -> int:
        with self._lock:
            if shard not in self._files:
                # Not truncated: an interrupted conversion or another rank may have written to it before.
                self._files[shard] = os.open(self._folder / shard, os.O_WRONLY | os.O_CREAT, 0o644)
                _write_whole(self._files[shard], memoryview(self._layout.headers[shard]), 0)
            return self._files[shard]

    def _publish(self, shard: str) -> None:
        """Hands a complete shard on."""
        if self._recipient is not None:
            self._recipient.take(self._folder / shard)

    def _close(self, shard: str) -> None:
        file = self._files.pop(shard)
        try:
            with naming(self._folder / shard):
                os.fsync(file)
        finally:
            os.close(file)

    def finish(self) -> None:
        """Writes the index.

        Raises:
            AssertionError: If a planned tensor was never written, a defect of the caller.
        """
        missing = sorted(name for names in self._missing.values() for name in names)
        assert not missing, f"{len(missing)} planned tensors were not written, the first is {missing[0]}"
        if len(self._layout.files) > 1:
            total = total_bytes(self._tensors.values())
            weight_map = {name: self._tensors[name].shard for name in sorted(self._tensors)}
            write_json(self._folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def close(self) -> None:
        """Closes what is open after a failure; what was written stays."""
        with self._lock:
            for file in self._files.values():
                os.close(file)
            self._files.clear()


def _all_of(tensor: Tensor) -> Pieces:
    """The bytes of a tensor in one piece."""

    def hand_on(write: Write) -> None:
        if tensor.numel():
            write(bytes_of(tensor.to("cpu").contiguous()), 0)

    return hand_on


def _write_at(file: int, planned: StoredTensor, pieces: Pieces, digest: "hashlib._Hash | None" = None) -> None:
    """Writes the bytes of a tensor to their position in an open shard, and adds them to a digest."""
    end = 0

    def write(content: memoryview, start: int) -> None:
        nonlocal end
        if digest is not None:
            assert start == end, f"a piece of {planned.name} at byte {start} follows byte {end}"
            digest.update(content)
            end += len(content)
        _write_whole(file, content, planned.offset + start)

    pieces(write)


def _write_whole(file: int, content: memoryview, start: int) -> None:
    """Writes bytes to a position in a file; a disk that is nearly full takes fewer of them at a time."""
    position = 0
    while position < len(content):
        position += os.pwrite(file, content[position:], start + position)


def _stored_digest(folder: Path, planned: StoredTensor) -> str | None:
    """SHA-256 of the bytes at the position of a tensor; ``None`` if they are not there."""
    digest, rest = hashlib.sha256(), planned.nbytes
    try:
        file = os.open(folder / planned.shard, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        while rest:
            content = os.pread(file, min(rest, _READ_BYTES), planned.offset + planned.nbytes - rest)
            if not content:
                return None
            digest.update(content)
            rest -= len(content)
    finally:
        os.close(file)
    return digest.hexdigest()


def overwrite_tensor(folder: Path, planned: StoredTensor, tensor: Tensor) -> None:
    """Writes a tensor over its earlier values in a finished shard, before the result is complete.

    Args:
        folder: Folder of the shard.
        planned: Its position.
        tensor: Its new values, of the same dtype and shape.
    """
    assert (tensor.dtype, tensor.shape) == (planned.dtype, planned.shape), (planned.name, tensor.dtype, tensor.shape)
    file = os.open(folder / planned.shard, os.O_WRONLY)
    try:
        _write_at(file, planned, _all_of(tensor))
        os.fsync(file)
    finally:
        os.close(file)
