"""Several sets of hidden states that share the batch of the model's own forward, one below the other.

R rows of S tokens each, H hidden size.
"""

from collections.abc import Hashable, Mapping, MutableMapping, Set
from copy import copy
from itertools import count
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from hcsmoe_hub.model.microbatch import join, select
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
        self._is_single = len(self._counts) == 1
        total = sum(self._counts.values())
        self._rows = total if self._is_single else next(rows for rows in count(total) if rows not in lengths)
        ids_RS = torch.cat(list(sets.values()))
        self.batch = torch.cat([ids_RS, *[ids_RS[:1]] * (self._rows - total)])
        # Objects that layers share, such as the keys and values of an earlier layer: one copy for each set.
        self._shared: dict[int, tuple[Any, dict[KeyT, Any]]] = {}

    def split(self, inputs: Call) -> dict[KeyT, Call]:
        """A layer's inputs for each set."""
        if self._is_single:
            return dict.fromkeys(self._counts, inputs)
        return {key: self._cut(inputs, rows, key) for key, rows in self.places().items()}

    def places(self) -> dict[KeyT, slice]:
        """The rows of each set."""
        places, start = dict[KeyT, slice](), 0
        for key, sequences in self._counts.items():
            places[key] = slice(start, start + sequences)
            start += sequences
        return places

    def _cut(self, inputs: Call, rows: slice, key: KeyT) -> Call:
        args = select(inputs.args, rows, self._rows)
        kwargs = select(dict(inputs.kwargs), rows, self._rows)
        return Call(
            tuple(self._own(value, key) for value in args),
            {name: self._own(value, key) for name, value in kwargs.items()},
        )

    def _own(self, value: Any, key: KeyT) -> Any:
        """An object that layers write to, as it is for one set."""
        if not isinstance(value, MutableMapping) or type(value) is dict:
            return value
        if id(value) not in self._shared:
            self._shared[id(value)] = (value, {each: copy(value) for each in self._counts})
        return self._shared[id(value)][1][key]

    def join(self, outputs: Mapping[KeyT, Any]) -> Any:
        """A layer's output for the whole batch; sets without one get copies of a row, as nobody looks at them."""
        first = next(iter(outputs))
        if self._is_single:
            return outputs[first]
        row = select(outputs[first], slice(0, 1), self._counts[first])
        parts = []
        for key, sequences in self._counts.items():
            parts += [outputs[key]] if key in outputs else [row] * sequences
        return join([*parts, *[row] * (self._rows - sum(self._counts.values()))])
