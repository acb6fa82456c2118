"""Files of tensors and JSON that a conversion keeps to be continued, laid out as safetensors files are.

They are written piece by piece, so that no second copy of a large tensor is in memory, and get their names when they
are on the disk. A digest of the whole file, which the journal keeps, says whether it still is what was written.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hcsmoe_hub.checkpoint.durable import write_file
from hcsmoe_hub.checkpoint.tensors import DTYPE_NAMES, DTYPES
from hcsmoe_hub.machine.allocator import bytes_of
from hcsmoe_hub.machine.transfer import Download, Leaving

_CONTENT = "content"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class State:
    """What a state file holds.

    Attributes:
        content: JSON.
        tensors: By name, on the host.
    """

    content: Any
    tensors: dict[str, Tensor]


def write_state(path: Path, content: Any, tensors: Mapping[str, Leaving], download: Download) -> str:
    """Writes a state file; when this returns, it is on the disk.

    Args:
        path: The file.
        content: JSON.
        tensors: By name.
        download: Brings them to the host.

    Returns:
        SHA-256 of the file, as ``read_state`` takes it.

    Raises:
        OSError: If it cannot be written.
    """
    digest = hashlib.sha256()

    def fill(file: BinaryIO) -> None:
        def write(piece: bytes | memoryview, position: int = 0) -> None:
            digest.update(piece)
            file.write(piece)

        write(_header(content, {name: leaving.values for name, leaving in tensors.items()}))
        for leaving in tensors.values():
            download.write(leaving, write)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, fill)
    return digest.hexdigest()


def _header(content: Any, tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {_CONTENT: json.dumps(content)}}
    position = 0
    for name, tensor in tensors.items():
        offsets = [position, position + tensor.nbytes]
        entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_state(path: Path, sha256: str) -> State | None:
    """Reads a state file into memory of its own; ``None`` if it is lost, or not what was written.

    Args:
        path: The file.
        sha256: What ``write_state`` returned.
    """
    try:
        with path.open("rb") as file:
            # Nothing in it is looked at before it has proved to be what was written.
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                return None
            file.seek(0)
            return _parse(file)
    except OSError:
        return None


def _parse(file: BinaryIO) -> State:
    entries: dict[str, Any] = json.loads(file.read(*struct.unpack("<Q", file.read(8))))
    content = json.loads(entries.pop("__metadata__")[_CONTENT])
    tensors = {}
    for name, entry in entries.items():
        # Memory of torch's own: sums of a matrix product can depend on where its operands begin.
        tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        if tensor.numel():
            file.readinto(bytes_of(tensor))  # type: ignore[attr-defined]
        tensors[name] = tensor
    return State(content=content, tensors=tensors)
