"""Names, shapes and positions of stored tensors, read from safetensors headers alone."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeGuard

import torch

from hcsmoe_hub.checkpoint.bounded_json import MAX_BYTES, parse_bounded
from hcsmoe_hub.checkpoint.lfs import refuse_pointer
from hcsmoe_hub.errors import SourceError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# Nearly every header fits into this, so one read, or one request, is enough.
FIRST_READ_BYTES = 100_000
# A config of a model; published ones have a few kilobytes.
MAX_CONFIG_BYTES = 4_000_000

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F4": torch.float4_e2m1fn_x2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
# An element of these in torch holds two values, and a header counts values.
PAIRS = frozenset({torch.float4_e2m1fn_x2})


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a safetensors file.

    Attributes:
        name: Key under which the file stores it.
        dtype: Element type.
        shape: Sizes in elements of ``dtype``, outermost first; ``()`` for a scalar.
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

    @property
    def header_shape(self) -> list[int]:
        """Sizes as a safetensors header gives them."""
        return [*self.shape[:-1], self.shape[-1] * 2] if self.dtype in PAIRS else list(self.shape)


def check_file_name(name: str, *, where: str) -> str:
    """Returns ``name`` if it stays inside its folder on every operating system.

    Raises:
        SourceError: For an absolute path, a drive, or a ``..`` component.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    escapes = posix.is_absolute() or windows.drive or windows.root or ".." in (*posix.parts, *windows.parts)
    if escapes or not name.strip():
        raise SourceError(
            f"{where} lists the file {name!r}, which is outside the checkpoint's own folder.",
            hint="do not use this checkpoint; its index is damaged or hostile",
        )
    return name


def read_index(text: str, *, where: str) -> dict[str, str]:
    """Reads ``weight_map`` of a safetensors index: tensor name to shard name.

    Raises:
        SourceError: If it is not an index, or lists a file outside the folder.
    """
    index = _parse_json(text, where=where, most=MAX_BYTES)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{where} has no weight_map.", hint="download the checkpoint again")
    return {str(name): check_file_name(str(shard), where=where) for name, shard in weight_map.items()}


def _parse_json(text: str, *, where: str, most: int) -> Any:
    try:
        return parse_bounded(text, most=most)
    except ValueError as error:
        raise SourceError(f"{where} is not valid JSON: {error}.", hint="download the checkpoint again") from None


def read_header(read: Callable[[int, int], bytes], *, shard: str) -> tuple[dict[str, Any], int]:
    """Reads the header of a local or remote safetensors file.

    Args:
        read: Returns the bytes from one position up to another; fewer if the file ends earlier.
        shard: Name of the file.

    Returns:
        The header, unchecked, and the offset of the first data byte.

    Raises:
        SourceError: If the file has no readable header, or is a Git LFS pointer.
    """
    start = read(0, FIRST_READ_BYTES)
    refuse_pointer(start, file=shard)
    header_bytes = int.from_bytes(start[:8], "little")
    content = start[8 : 8 + header_bytes]
    if len(content) < header_bytes <= MAX_BYTES:
        content = read(8, 8 + header_bytes)
    try:
        header = parse_bounded(content) if len(content) == header_bytes else None
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise SourceError(
            f"{shard} is not a safetensors file, or it is truncated: a header of {header_bytes} bytes cannot be read.",
            hint="download this shard again",
        )
    return header, 8 + header_bytes


def local_header(path: Path) -> tuple[dict[str, Any], int]:
    """Reads the header of a local safetensors file; see ``read_header``."""
    with path.open("rb") as file:

        def read(start: int, end: int) -> bytes:
            file.seek(start)
            return file.read(end - start)

        return read_header(read, shard=path.name)


def local_bytes(path: Path, tensor: StoredTensor, count: int) -> bytes:
    """At most ``count`` first bytes of a tensor in a local safetensors file."""
    with path.open("rb") as file:
        file.seek(tensor.offset)
        return file.read(min(count, tensor.nbytes))


def stored_tensors(
    header: Mapping[str, Any], *, shard: str, data_start: int, file_bytes: int
) -> dict[str, StoredTensor]:
    """Turns a header into tensors, and checks all of its values.

    Raises:
        SourceError: For an unknown dtype, or sizes that disagree with each other or with the file.
    """
    tensors = {
        name: _stored_tensor(name, entry if isinstance(entry, dict) else {}, shard=shard, data_start=data_start)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    end_of_data = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end_of_data:
            raise SourceError(
                f"{shard}: tensor {tensor.name!r} begins at byte {tensor.offset}, "
                f"but the one before it ends at {end_of_data}.",
                hint="download this shard again",
            )
        end_of_data += tensor.nbytes
    if end_of_data != file_bytes:
        raise SourceError(
            f"{shard} is {file_bytes} bytes long, but its header describes {end_of_data}: it is truncated or damaged.",
            hint="download this shard again",
        )
    return tensors


def _stored_tensor(name: str, entry: Mapping[str, Any], *, shard: str, data_start: int) -> StoredTensor:
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise SourceError(
            f"{shard}: tensor {name!r} has the dtype {dtype}, which PyTorch {torch.__version__} does not have.",
            hint=f"pass a checkpoint whose dtypes are among {', '.join(DTYPES)}",
        )
    is_paired = DTYPES[dtype] in PAIRS
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2) or (
        is_paired and (not shape or shape[-1] % 2)
    ):
        raise SourceError(
            f"{shard}: tensor {name!r} has the shape {shape} and the offsets {offsets}, which are not valid.",
            hint="download this shard again",
        )
    start, end = offsets
    sizes = (*shape[:-1], shape[-1] // 2) if is_paired else tuple(shape)
    tensor = StoredTensor(name=name, dtype=DTYPES[dtype], shape=sizes, shard=shard, offset=data_start + start)
    if end - start != tensor.nbytes:
        raise SourceError(
            f"{shard}: tensor {name!r} of shape {shape} needs {tensor.nbytes} bytes, "
            f"but its header reserves {end - start}.",
            hint="download this shard again",
        )
    return tensor


def _are_sizes(numbers: object) -> TypeGuard[list[int]]:
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)


def check_index(weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    """Compares an index with the shards that it lists.

    Raises:
        SourceError: If a tensor is missing, or is in a different shard.
    """
    for name, shard in weight_map.items():
        found = tensors.get(name)
        if found is None or found.shard != shard:
            place = "in no shard" if found is None else f"in {found.shard}"
            raise SourceError(
                f"the index places tensor {name!r} in {shard}, but it is {place}.",
                hint="download the checkpoint again; if its own index is wrong, correct the index",
            )


def total_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Sum of the stored sizes."""
    return sum(tensor.nbytes for tensor in tensors)


def parse_config(text: str, *, where: str) -> dict[str, Any]:
    """Reads a ``config.json``.

    Raises:
        SourceError: If it is not a JSON object.
    """
    config = _parse_json(text, where=where, most=MAX_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise SourceError(f"{where} is not a JSON object.", hint="download the checkpoint again")
    return config
