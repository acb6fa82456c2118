"""Tensors that are read when, and only when, a loader asks for them."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import Tensor

from hcsmoe_hub.checkpoint.formats import LogicalTensor
from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.machine.accelerator import is_host

# Called with a tensor, its parts as they are stored, by role, and its values.
OnRead: TypeAlias = Callable[[LogicalTensor, Mapping[str, Tensor], Tensor], None]


def read_logical(tensor: LogicalTensor, reader: TensorReader) -> tuple[dict[str, Tensor], Tensor]:
    """Reads the parts of a tensor, by role, and its values."""
    parts = {role: reader.read(part) for role, part in tensor.parts.items()}
    return parts, parts[""] if tensor.codec is None else tensor.codec.decode(parts)


def read_into(
    tensor: LogicalTensor, reader: TensorReader, target: Tensor, copy: Callable[[Tensor, Tensor], None]
) -> tuple[dict[str, Tensor], Tensor]:
    """Reads a tensor to the place where it is needed: on the host without a copy, if it is stored in that dtype.

    Args:
        tensor: What to read.
        reader: Where to read it.
        target: Memory of the same shape, in any dtype and on any device.
        copy: Writes values over a target that they cannot be read to.

    Returns:
        Its parts as they are stored, by role, and its values as stored or decoded, on the host.
    """
    is_as_stored = tensor.codec is None and tensor.dtype == target.dtype
    if is_as_stored and is_host(target.device) and target.is_contiguous():
        values = reader.read(tensor.parts[""], into=target)
        return {"": values}, values
    parts, values = read_logical(tensor, reader)
    copy(target, values)
    return parts, values


class LazyTensor:
    """A tensor that transformers' loader reads when, and only when, it indexes it.

    Args:
        tensor: What to read.
        reader: Where to read it.
        on_read: Called with the tensor before any conversion or cast.
    """

    def __init__(self, tensor: LogicalTensor, reader: TensorReader, on_read: OnRead) -> None:
        self.tensor = tensor
        self._reader = reader
        self._on_read = on_read

    def __getitem__(self, index: object) -> Tensor:
        assert index is Ellipsis, "transformers reads whole tensors"
        parts, values = read_logical(self.tensor, self._reader)
        self._on_read(self.tensor, parts, values)
        return values
