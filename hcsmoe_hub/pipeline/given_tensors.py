"""Finds out which layers change the tensors that they are given, as a layer may that adds to its input in place."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hcsmoe_hub.pipeline.packing import tensors_in


class GivenTensors:
    """Learns from every layer that runs what to expect of the next one of its kind."""

    def __init__(self) -> None:
        # By kind, whether a layer leaves alone what it is given.
        self._leaves_alone: dict[tuple[type, ...], bool] = {}
        self._kind: tuple[type, ...] | None = None
        self._given: Sequence[tuple[Tensor, int]] = ()

    def may_change(self, module: nn.Module, inputs: Any) -> bool:
        """Whether a layer may change its inputs: layers of its kind do, or none has run yet.

        Args:
            module: The layer, which runs next.
            inputs: Tensors inside tuples, lists and mappings.
        """
        self._kind = tuple(map(type, module.modules()))
        self._given = [(tensor, tensor._version) for tensor in tensors_in(inputs)]
        return not self._leaves_alone.get(self._kind, False)

    def learn(self) -> None:
        """Looks at the inputs of the layer that has run, if one has."""
        if self._kind is not None:
            is_same = all(tensor._version == version for tensor, version in self._given)
            self._leaves_alone[self._kind] = is_same and self._leaves_alone.get(self._kind, True)
        self._kind, self._given = None, ()
