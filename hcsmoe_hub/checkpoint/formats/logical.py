"""What a model sees of stored tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hcsmoe_hub.checkpoint.tensors import StoredTensor

# Roles that every format has; a format may have more, such as "zero_point".
WEIGHT, SCALE = "weight", "scale"


class Codec(Protocol):
    """One way of storing a tensor as several: codes of a few bits, and the scales that they are multiplied by.

    A part is one of these stored tensors, known by its role: ``weight`` are the codes, ``scale`` are the scales.
    Shapes are those of the logical tensor, with the experts first where it holds several: ``[R, C]`` or ``[E, R, C]``.
    """

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the decoded values."""
        ...

    @property
    def carried(self) -> tuple[str, ...]:
        """Roles of the parts that are neither decoded nor encoded: scales of activations, which calibration found."""
        ...

    @property
    def row_step(self) -> int:
        """What the length of a row must be a multiple of; 1 where the last block of a row may be a partial one.

        A row holds what one output is computed from, whichever dimension that is.
        """
        ...

    def part_names(self, name: str) -> dict[str, str]:
        """Stored key of every part, by role.

        Args:
            name: Key of the logical tensor.
        """
        ...

    def part_specs(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every part, by role.

        Args:
            shape: Shape of the logical tensor.
        """
        ...

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The values: code times scale in float32, rounded once to ``dtype``.

        Args:
            parts: Every part that is not carried, by role.
        """
        ...

    def encode(self, values: Tensor, *, scale: Tensor | None = None) -> dict[str, Tensor]:
        """The parts that store some values, but for those that are carried.

        Codes are rounded to the nearest one, ties to the even code, and saturate. Blocks of zeros give zeros again.

        Args:
            values: The logical tensor, finite.
            scale: The part with this role; by default it is computed from the values, as the publishers of the
                format do. With the scales that values were decoded with, the codes are those that were decoded.
        """
        ...

    def encode_as(self, values: Tensor, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts that store some values with the scales, and what else belongs to them, of other parts."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalTensor:
    """A tensor as a model sees it, and the stored tensors that it is made of.

    Attributes:
        name: Key under which an unquantised checkpoint would store it.
        shape: Sizes of the values, outermost first.
        dtype: Dtype of the values once they are decoded.
        parts: Stored tensor by role; ``{"": tensor}`` for one that is stored as it is.
        codec: What decodes the parts; ``None`` if there is nothing to decode.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Mapping[str, StoredTensor]
    codec: Codec | None

    @property
    def nbytes(self) -> int:
        """Bytes of all parts in the files."""
        return sum(part.nbytes for part in self.parts.values())
