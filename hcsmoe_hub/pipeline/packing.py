"""Takes apart what layers return and reports hold into JSON and tensors, and puts it together again."""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hcsmoe_hub.checkpoint.tensors import DTYPE_NAMES
from hcsmoe_hub.model.microbatch import Uncut

_PLAIN = (str, int, float, bool, type(None))


class CannotBeStoredError(TypeError):
    """A value holds something that a state file cannot, which the message names."""


class Packer:
    """Takes values apart.

    Attributes:
        tensors: Every tensor that was found so far, by name; one that is found again is there once.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}

    def pack(self, value: Any) -> Any:
        """The same as JSON that refers to tensors by name.

        Args:
            value: Tensors, those that all sequences share, arrays, numbers, texts and ``None``, inside tuples, lists
                and mappings.

        Raises:
            CannotBeStoredError: If there is anything else in it.
        """
        if isinstance(value, Tensor):
            return {"tensor": self._name(value)}
        if isinstance(value, Uncut):
            return {"uncut": self._name(value.tensor)}
        if isinstance(value, np.ndarray):
            return {"array": self._name(_of_array(value))}
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, tuple | list):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [self.pack(item) for item in value]}
        if isinstance(value, Mapping):
            return {"mapping": [[self.pack(key), self.pack(item)] for key, item in value.items()]}
        raise CannotBeStoredError(f"an object of the class {type(value).__name__}")

    def _name(self, tensor: Tensor) -> str:
        if tensor.dtype not in DTYPE_NAMES or tensor.layout is not torch.strided:
            raise CannotBeStoredError(f"a tensor of {tensor.dtype} and {tensor.layout}")
        if id(tensor) not in self._names:
            self._names[id(tensor)] = name = str(len(self.tensors))
            self.tensors[name] = tensor
        return self._names[id(tensor)]


def _of_array(array: np.ndarray) -> Tensor:
    """A copy of an array."""
    try:
        return torch.from_numpy(np.array(array, order="C"))
    except TypeError as error:
        raise CannotBeStoredError(f"an array of {array.dtype}") from error


def unpack(content: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of ``Packer.pack``; mappings become dicts.

    Args:
        content: What it returned.
        tensors: What it found.
    """
    if not isinstance(content, dict):
        return content
    ((kind, found),) = content.items()
    match kind:
        case "tensor":
            return tensors[found]
        case "uncut":
            return Uncut(tensors[found])
        case "array":
            return tensors[found].numpy()
        case "tuple":
            return tuple(unpack(item, tensors) for item in found)
        case "list":
            return [unpack(item, tensors) for item in found]
        case _:
            return {unpack(key, tensors): unpack(item, tensors) for key, item in found}


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Every tensor inside tuples, lists and mappings."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Uncut):
        yield values.tensor
    elif isinstance(values, tuple | list):
        for item in values:
            yield from tensors_in(item)
    elif isinstance(values, Mapping):
        yield from tensors_in(list(values.values()))


def shared_objects(values: Any) -> list[MutableMapping[Any, Any]]:
    """The objects in a layer's inputs that layers write to, such as keys and values that later layers share."""
    if type(values) in (tuple, list):
        return [found for item in values for found in shared_objects(item)]
    if type(values) is dict:
        return [found for item in values.values() for found in shared_objects(item)]
    return [values] if isinstance(values, MutableMapping) else []
