"""Tensors that are read when, and only when, a loader asks for them."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import Tensor

from hcsmoe_hub.checkpoint.formats import LogicalTensor
from hcsmoe_hub.checkpoint.reader import TensorReader

# Called with a tensor, its parts as they are stored, by role, and its values.
OnRead: TypeAlias = Callable[[LogicalTensor, Mapping[str, Tensor], Tensor], None]


def read_logical(tensor: LogicalTensor, reader: TensorReader) -> tuple[dict[str, Tensor], Tensor]:
    """Reads the parts of a tensor, by role, and its values."""
    parts = {role: reader.read(part) for role, part in tensor.parts.items()}
    return parts, parts[""] if tensor.codec is None else tensor.codec.decode(parts)


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
