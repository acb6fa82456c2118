"""Names, shapes and places of stored tensors, read from safetensors headers and from nothing else."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from huggingface_hub.errors import SafetensorsParsingError
from huggingface_hub.utils import SafetensorsFileMetadata

from hcsmoe_hub.errors import SourceError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a safetensors file.

    Attributes:
        name: Key under which the file stores it.
        dtype: Element type.
        shape: Sizes, outermost first; ``()`` for a scalar.
        shard: Name of the file that holds it.
        offset: Position of its first byte, counted from the start of the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: str
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes in the file."""
        return self.numel * self.dtype.itemsize


def check_file_name(name: str, *, where: str) -> str:
    """Returns ``name`` if it stays inside its folder on every operating system.

    Raises:
        SourceError: For an absolute path, a drive, or a ``..`` component.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    escapes = posix.is_absolute() or windows.drive or windows.root or ".." in (*posix.parts, *windows.parts)
    if escapes or not name.strip():
        raise SourceError(
            f"{where} names the file {name!r}, which lies outside the checkpoint's own folder.",
            hint="do not use this checkpoint; its index is damaged or hostile",
        )
    return name


def read_index(text: str, *, where: str) -> dict[str, str]:
    """Reads ``weight_map`` of a safetensors index: tensor name to shard name.

    Raises:
        SourceError: If it is no index, or names a file outside the folder.
    """
    try:
        index = json.loads(text)
    except json.JSONDecodeError as error:
        raise SourceError(f"{where} is not valid JSON: {error}.", hint="download the checkpoint again") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{where} has no weight_map.", hint="download the checkpoint again")
    return {str(name): check_file_name(str(shard), where=where) for name, shard in weight_map.items()}


def local_header(path: Path) -> tuple[SafetensorsFileMetadata, int]:
    """Reads the header of a local safetensors file.

    Returns:
        The parsed header and the offset of the first data byte.

    Raises:
        SourceError: If the file has no readable header.
    """
    from huggingface_hub.hf_api import parse_local_safetensors_file_metadata

    try:
        metadata = parse_local_safetensors_file_metadata(path)
    except SafetensorsParsingError as error:
        raise SourceError(
            f"{path.name} is no safetensors file, or it is truncated: {error}", hint="download this shard again"
        ) from None
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    return metadata, 8 + header_bytes


def stored_tensors(
    metadata: SafetensorsFileMetadata, *, shard: str, data_start: int, file_bytes: int
) -> dict[str, StoredTensor]:
    """Turns a parsed header into tensors, trusting none of its sizes.

    Raises:
        SourceError: For an unknown dtype, or sizes that disagree with each other or with the file.
    """
    tensors = {}
    end_of_data = data_start
    for name, info in metadata.tensors.items():
        if info.dtype not in DTYPES:
            raise SourceError(
                f"{shard}: tensor {name!r} has the dtype {info.dtype}, which is not known.",
                hint=f"known dtypes are {', '.join(DTYPES)}",
            )
        start, end = info.data_offsets
        tensor = StoredTensor(
            name=name, dtype=DTYPES[info.dtype], shape=tuple(info.shape), shard=shard, offset=data_start + start
        )
        if start < 0 or any(size < 0 for size in tensor.shape) or end - start != tensor.nbytes:
            raise SourceError(
                f"{shard}: tensor {name!r} of shape {list(tensor.shape)} needs {tensor.nbytes} bytes, "
                f"its header reserves {end - start}.",
                hint="download this shard again",
            )
        end_of_data = max(end_of_data, data_start + end)
        tensors[name] = tensor
    if end_of_data != file_bytes:
        raise SourceError(
            f"{shard} is {file_bytes} bytes long, its header describes {end_of_data}: the shard is truncated or damaged.",
            hint="download this shard again",
        )
    return tensors


def check_index(weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    """Compares an index with the shards that it names.

    Raises:
        SourceError: If a tensor is missing, or lies in another shard than the index says.
    """
    for name, shard in weight_map.items():
        found = tensors.get(name)
        if found is None or found.shard != shard:
            place = "in no shard" if found is None else f"in {found.shard}"
            raise SourceError(
                f"the index places tensor {name!r} in {shard}, but it is {place}.", hint="download the checkpoint again"
            )


def total_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Sum of the stored sizes."""
    return sum(tensor.nbytes for tensor in tensors)


def parse_config(text: str, *, where: str) -> dict[str, Any]:
    """Reads a ``config.json``.

    Raises:
        SourceError: If it is not a JSON object.
    """
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise SourceError(f"{where} is not valid JSON: {error}.", hint="download the checkpoint again") from None
    if not isinstance(config, dict):
        raise SourceError(f"{where} holds no JSON object.", hint="download the checkpoint again")
    return config
