"""Several sets of hidden states that share the batch of the model's own forward, one below the other.

R rows of S tokens each, H hidden size.
"""

from collections.abc import Hashable, Mapping, MutableMapping, Set
from copy import copy
from itertools import count
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from hcsmoe_hub.machine.accelerator import is_host
from hcsmoe_hub.model.microbatch import select
from hcsmoe_hub.model.unseen import Unseen
from hcsmoe_hub.observation.statistics import Call

KeyT = TypeVar("KeyT", bound=Hashable)


class Rows(Generic[KeyT]):
    """How sets of hidden states share a batch.

    Whatever the model does between its layers, it does to all of them. Within a layer each set runs on its own, so
    what is observed on one of them does not depend on the others.

    Args:
        sets: Token ids of every set, ``[sequences, S]`` int64; those without sequences are left out.
        lengths: Tokens per sequence in any of the layers.

    Attributes:
        batch: ``[R, S]`` int64: the sequences of every set, and a few rows more where there would be as many rows as
            tokens.
    """

    def __init__(self, sets: Mapping[KeyT, Tensor], *, lengths: Set[int]) -> None:
        self._counts = {key: len(ids) for key, ids in sets.items() if len(ids)}
        total = sum(self._counts.values())
        # Nobody could tell sequences from tokens by the size of a dimension.
        self._rows = next(rows for rows in count(total) if rows not in lengths)
        self._is_single = len(self._counts) == 1 and self._rows == total
        ids_RS = torch.cat(list(sets.values()))
        self.batch = torch.cat([ids_RS, *[ids_RS[:1]] * (self._rows - total)])
        # Objects that layers share, such as the keys and values of an earlier layer: one copy for each set.
        self._shared: dict[int, tuple[Any, dict[KeyT, Any]]] = {}

    def split(self, inputs: Call) -> dict[KeyT, Call]:
        """A layer's inputs for each set."""
        return {key: self._cut(inputs, rows, key) for key, rows in self.places().items()}

    def places(self) -> dict[KeyT, slice]:
        """The rows of each set."""
        places, start = dict[KeyT, slice](), 0
        for key, sequences in self._counts.items():
            places[key] = slice(start, start + sequences)
            start += sequences
        return places

    def _cut(self, inputs: Call, rows: slice, key: KeyT) -> Call:
        return Call(
            tuple(self._of(value, rows, key) for value in inputs.args),
            {name: self._of(value, rows, key) for name, value in inputs.kwargs.items()},
        )

    def _of(self, value: Any, rows: slice, key: KeyT) -> Any:
        """What belongs to one set."""
        if isinstance(value, Unseen) and (part := value.part(key)) is not None:
            return part
        if type(value) in (tuple, list):
            return type(value)(self._of(item, rows, key) for item in value)
        if type(value) is dict:
            return {name: self._of(item, rows, key) for name, item in value.items()}
        if self._is_single:
            return value
        return self._own(value, key) if isinstance(value, MutableMapping) else select(value, rows, self._rows)

    def _own(self, value: MutableMapping[Any, Any], key: KeyT) -> Any:
        """An object that layers write to, as it is for one set."""
        if id(value) not in self._shared:
            self._shared[id(value)] = (value, {each: copy(value) for each in self._counts})
        return self._shared[id(value)][1][key]

    def join(self, outputs: Mapping[KeyT, Any]) -> Any:
        """A layer's output for the whole batch; sets without one get copies of a row, as nobody looks at them."""
        return self._joined(outputs)

    def _joined(self, outputs: Mapping[KeyT, Any]) -> Any:
        first = next(iter(outputs.values()))
        if isinstance(first, Tensor):
            return self._join_tensors(outputs)
        if type(first) in (tuple, list):
            places = range(len(first))
            return type(first)(
                self._joined({key: output[place] for key, output in outputs.items()}) for place in places
            )
        if type(first) is dict:
            return {name: self._joined({key: output[name] for key, output in outputs.items()}) for name in first}
        return first

    def _join_tensors(self, outputs: Mapping[KeyT, Tensor]) -> Tensor:
        key, first = next(iter(outputs.items()))
        if self._is_single and is_host(first.device):
            return first
        if first.dim() > 0 and first.shape[0] == self._counts[key]:
            return Unseen(outputs, self._counts, self._rows)
        # Logits of a router, say, which belong to no row: those of one set.
        return Unseen({key: first}, {key: len(first)}, len(first)) if first.dim() > 0 else first
