"""Hidden states between two layers that the model only passes on, wherever and in how many parts they are kept.

R rows of all parts.
"""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hcsmoe_hub.machine.accelerator import HOST


class Unseen(torch.Tensor):
    """Parts of a batch that pass for one tensor on the host.

    They are put together only if the model looks at them: if anything but a layer of the stream computes with them.

    Args:
        parts: The rows of each set that has any, one below the other; on any device.
        counts: Number of rows of every set; one without rows of its own gets copies of a row, as nobody looks at them.
        rows: R; what is missing is filled up in the same way.
    """

    @staticmethod
    def __new__(cls, parts: Mapping[Any, Tensor], counts: Mapping[Any, int], rows: int) -> "Unseen":
        first = next(iter(parts.values()))
        shape = (rows, *first.shape[1:])
        made: Unseen = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=first.dtype, device=HOST)
        return made

    def __init__(self, parts: Mapping[Any, Tensor], counts: Mapping[Any, int], rows: int) -> None:
        super().__init__()
        self._parts = dict(parts)
        self._counts = counts
        self._rows = rows
        self._whole: Tensor | None = None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(_seen, (args, kwargs or {}))
        return func(*args, **kwargs)

    def part(self, key: Hashable) -> Tensor | None:
        """The rows of one set, where they are kept; ``None`` if it has none, or the model has looked at them."""
        return self._parts.get(key)

    def whole(self) -> Tensor:
        """All rows on the host."""
        if self._whole is None:
            row = next(iter(self._parts.values()))[:1]
            found = [
                self._parts[key] if key in self._parts else row.expand(count, *row.shape[1:])
                for key, count in self._counts.items()
            ]
            missing = self._rows - sum(self._counts.values())
            parts = [part.to(HOST) for part in (*found, row.expand(missing, *row.shape[1:]))]
            self._whole = parts[0] if len(parts[0]) == self._rows else torch.cat(parts)
            # What changes it from now on has to be seen.
            self._parts = {}
        return self._whole


def _seen(value: Any) -> Any:
    return value.whole() if isinstance(value, Unseen) else value
