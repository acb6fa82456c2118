"""The sets of hidden states that one forward of the model carries along, one below the other in its batch.

B calibration sequences and M held-out ones, of S tokens each.
"""

from collections.abc import Mapping, MutableMapping, Set
from copy import copy
from enum import Enum
from itertools import count
from typing import Any

import torch
from torch import Tensor

from hcsmoe_hub.model.microbatch import join, select
from hcsmoe_hub.observation.statistics import Call


class Part(Enum):
    """The sets of hidden states, in the order of the batch."""

    SOURCE = "calibration sequences in the source"
    MEASURED = "held-out sequences in the source"
    REDUCED = "calibration sequences in the reduced model"
    MEASURED_REDUCED = "held-out sequences in the reduced model"

    @property
    def is_measured(self) -> bool:
        """Whether nothing but the cost of the conversion is measured on it."""
        return self in (Part.MEASURED, Part.MEASURED_REDUCED)

    @property
    def is_reduced(self) -> bool:
        """Whether it runs through the layers of the result."""
        return self in (Part.REDUCED, Part.MEASURED_REDUCED)

    @property
    def original(self) -> "Part":
        """The same sequences in the source."""
        return Part.MEASURED if self.is_measured else Part.SOURCE


class Streams:
    """How the sets of hidden states share the batch of the model's own forward.

    Whatever the model does between its layers, it does to all of them. Within a layer each set runs on its own, so
    what is observed on the calibration sequences does not depend on the others.

    Args:
        token_ids: The calibration sequences, ``[B, S]`` int64; B may be 0.
        measured_ids: The held-out sequences, ``[M, S]`` int64; M may be 0.
        doubles: Whether the calibration sequences run through the reduced model as well; held-out ones always do.
        lengths: Tokens per sequence in any of the layers.

    Attributes:
        batch: ``[rows, S]`` int64: the sequences of every set, and a few rows more where there would be as many rows as
            tokens.
        measured_ids: The held-out sequences.
    """

    def __init__(self, token_ids: Tensor, measured_ids: Tensor, *, doubles: bool, lengths: Set[int]) -> None:
        self.measured_ids = measured_ids
        doubled_ids = token_ids if doubles else token_ids[:0]
        sets = dict(zip(Part, (token_ids, measured_ids, doubled_ids, measured_ids), strict=True))
        self._counts = {part: len(ids) for part, ids in sets.items() if len(ids)}
        self._is_single = set(self._counts) == {Part.SOURCE}
        total = sum(self._counts.values())
        self._rows = total if self._is_single else next(rows for rows in count(total) if rows not in lengths)
        ids_RS = torch.cat(list(sets.values()))
        self.batch = torch.cat([ids_RS, *[ids_RS[:1]] * (self._rows - total)])
        # Objects that layers share, such as the keys and values of an earlier layer: one copy for each set.
        self._shared: dict[int, tuple[Any, dict[Part, Any]]] = {}

    def split(self, inputs: Call) -> dict[Part, Call]:
        """A layer's inputs for each set."""
        if self._is_single:
            return {Part.SOURCE: inputs}
        return {part: self._cut(inputs, rows, part) for part, rows in self._places().items()}

    def _places(self) -> dict[Part, slice]:
        """The rows of each set."""
        places, start = dict[Part, slice](), 0
        for part, sequences in self._counts.items():
            places[part] = slice(start, start + sequences)
            start += sequences
        return places

    def _cut(self, inputs: Call, rows: slice, part: Part) -> Call:
        args = select(inputs.args, rows, self._rows)
        kwargs = select(dict(inputs.kwargs), rows, self._rows)
        return Call(
            tuple(self._own(value, part) for value in args),
            {name: self._own(value, part) for name, value in kwargs.items()},
        )

    def _own(self, value: Any, part: Part) -> Any:
        """An object that layers write to, as it is for one set."""
        if not isinstance(value, MutableMapping) or type(value) is dict:
            return value
        if id(value) not in self._shared:
            self._shared[id(value)] = (value, {part: copy(value) for part in self._counts})
        return self._shared[id(value)][1][part]

    def join(self, outputs: Mapping[Part, Any]) -> Any:
        """A layer's output for the whole batch; sets without one get copies of a row, as nobody looks at them."""
        if self._is_single:
            return outputs[Part.SOURCE]
        first = next(iter(outputs))
        row = select(outputs[first], slice(0, 1), self._counts[first])
        parts = []
        for part, sequences in self._counts.items():
            parts += [outputs[part]] if part in outputs else [row] * sequences
        return join([*parts, *[row] * (self._rows - sum(self._counts.values()))])

    def measured(self, hidden_RSH: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states of the held-out sequences in the source and in the reduced model, ``[M, S, H]`` each.

        Args:
            hidden_RSH: Those of the whole batch.
        """
        places = self._places()
        return hidden_RSH[places[Part.MEASURED]].clone(), hidden_RSH[places[Part.MEASURED_REDUCED]].clone()
