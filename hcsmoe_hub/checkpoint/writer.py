"""Writes the planned shards layer by layer, without holding a shard in memory.

The plan knows every name, dtype and shape beforehand, so each shard's header is written first and each tensor goes
straight to its own position in the file. (safetensors itself can only save a shard that is complete in memory.)
A shard has a temporary name until its last tensor is written; the index is written last of all.
"""

import json
import os
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from hcsmoe_hub.checkpoint.tensors import DTYPE_NAMES, INDEX_FILE, StoredTensor, total_bytes

INCOMPLETE = ".incomplete"
# Lock file in the folder while a result is being written; a killed process leaves it behind.
UNFINISHED = f"hcsmoe{INCOMPLETE}"


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
    """

    def __init__(self, folder: Path, layout: ShardLayout, recipient: Recipient | None = None) -> None:
        self._folder = folder
        self._layout = layout
        self._recipient = recipient
        self._tensors = layout.tensors
        self._missing = {shard: {tensor.name for tensor in tensors} for shard, tensors in layout.files.items()}
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        self.bytes_written = 0

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor; its shard gets its final name with its last tensor.

        Raises:
            AssertionError: If the tensor differs from the plan or was written before, a defect of the caller.
        """
        if self._recipient is not None:
            self._recipient.wait_for_space()
        planned = self._tensors[name]
        assert name in self._missing[planned.shard], f"{name} was written before"
        assert (tensor.dtype, tensor.shape) == (planned.dtype, planned.shape), (name, tensor.dtype, tensor.shape)
        _write_at(self._file(planned.shard), planned, tensor)
        with self._lock:
            self.bytes_written += planned.nbytes
            self._missing[planned.shard].remove(name)
            if not self._missing[planned.shard]:
                self._publish(planned.shard)

    def _file(self, shard: str) -> int:
        with self._lock:
            if shard not in self._files:
                path = self._folder / (shard + INCOMPLETE)
                self._files[shard] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                os.pwrite(self._files[shard], self._layout.headers[shard], 0)
            return self._files[shard]

    def _publish(self, shard: str) -> None:
        file = self._files.pop(shard)
        os.fsync(file)
        os.close(file)
        os.replace(self._folder / (shard + INCOMPLETE), self._folder / shard)
        if self._recipient is not None:
            self._recipient.take(self._folder / shard)

    def finish(self) -> None:
        """Writes the index, which marks the weights as complete.

        Raises:
            AssertionError: If a planned tensor was never written, a defect of the caller.
        """
        missing = sorted(name for names in self._missing.values() for name in names)
        assert not missing, f"{len(missing)} planned tensors were not written, the first is {missing[0]}"
        if len(self._layout.files) > 1:
            total = total_bytes(self._tensors.values())
            weight_map = {name: self._tensors[name].shard for name in sorted(self._tensors)}
            write_json(self._folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def abandon(self) -> None:
        """Removes every shard, finished or not, after a failure."""
        with self._lock:
            for file in self._files.values():
                os.close(file)
            self._files.clear()
        for shard in self._layout.files:
            (self._folder / shard).unlink(missing_ok=True)
            (self._folder / (shard + INCOMPLETE)).unlink(missing_ok=True)


def _write_at(file: int, planned: StoredTensor, tensor: Tensor) -> None:
    """Writes the bytes of a tensor to their position in an open shard."""
    content = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    buffer, position = memoryview(content.data), 0
    while position < planned.nbytes:
        position += os.pwrite(file, buffer[position:], planned.offset + position)


def overwrite_tensor(folder: Path, planned: StoredTensor, tensor: Tensor) -> None:
    """Writes a tensor over its earlier values in a finished shard, before the index marks the weights as complete.

    Args:
        folder: Folder of the shard.
        planned: Its position.
        tensor: Its new values, of the same dtype and shape.
    """
    assert (tensor.dtype, tensor.shape) == (planned.dtype, planned.shape), (planned.name, tensor.dtype, tensor.shape)
    file = os.open(folder / planned.shard, os.O_WRONLY)
    try:
        _write_at(file, planned, tensor)
        os.fsync(file)
    finally:
        os.close(file)


def is_occupied(folder: Path) -> bool:
    """Whether a folder holds anything other than what a killed conversion left there."""
    return folder.is_dir() and any(folder.iterdir()) and not (folder / UNFINISHED).exists()


def write_json(path: Path, content: Any) -> None:
    """Writes JSON under a temporary name, then renames it."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, then renames it."""
    temporary = path.with_name(path.name + INCOMPLETE)
    temporary.write_bytes(content)
    os.replace(temporary, path)
