"""Scales that each cover a block of a tensor: their shapes, and which values they belong to."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

WHOLE = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """How a tensor is cut into blocks with one scale each; the last block of a dimension may be a partial one.

    Attributes:
        block: Size of a block along every dimension of the tensor; ``WHOLE`` is the size of the dimension, whatever
            it is, so that a scale per tensor has ``(WHOLE, WHOLE)`` and one per row has ``(1, WHOLE)``.
        dropped: Number of last dimensions, of size 1, that the scales are stored without.
    """

    block: tuple[int, ...]
    dropped: int = 0

    @classmethod
    def between(cls, shape: Sequence[int], scales: Sequence[int], sizes: Sequence[Iterable[int]]) -> Self | None:
        """The grid that gives a tensor of one shape scales of another; ``None`` if there is none.

        Args:
            shape: Shape of the tensor.
            scales: Shape of the scales; missing last dimensions have size 1.
            sizes: Possible sizes of a block for each of the last dimensions, other than 1 and the whole dimension.
        """
        dropped = len(shape) - len(scales)
        if dropped < 0:
            return None
        block = []
        possible = [()] * (len(shape) - len(sizes)) + list(sizes)
        for size, count, known in zip(shape, [*scales, *[1] * dropped], possible, strict=True):
            fitting = [length for length in known if length > 0 and math.ceil(size / length) == count]
            if count == size:
                block.append(1)
            elif count == 1:
                block.append(WHOLE)
            elif fitting:
                block.append(fitting[0])
            else:
                return None
        return cls(block=tuple(block), dropped=dropped)

    def counts(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Number of blocks along every dimension of a tensor."""
        return tuple(
            1 if length == WHOLE else math.ceil(size / length) for size, length in zip(shape, self.block, strict=True)
        )

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape in which the scales of a tensor are stored."""
        counts = self.counts(shape)
        return counts[: len(counts) - self.dropped]

    def per_matrix(self, scales: Tensor, shape: Sequence[int]) -> Tensor:
        """Scales as stored to scales ``[E, r, c]``, one matrix for each of a tensor (``E`` is 1 for a matrix)."""
        counts = self.counts(shape)
        matrices = shape[0] if len(shape) == 3 else 1
        return scales.reshape(counts[0] if len(counts) == 3 else 1, *counts[-2:]).expand(matrices, -1, -1)

    def spread(self, scales: Tensor, shape: Sequence[int]) -> Tensor:
        """Scales of one matrix ``[r, c]`` to a tensor that multiplies a matrix ``[R, C]``, or broadcasts to it."""
        for dimension, (size, length) in enumerate(zip(shape, self.block[-2:], strict=True)):
            if scales.shape[dimension] not in (1, size):
                scales = scales.repeat_interleave(length, dimension).narrow(dimension, 0, size)
        return scales

    def reduce(self, values: Tensor, *, largest: bool = True) -> Tensor:
        """Largest, or smallest, value of every block, in the shape and order of the stored scales.

        Args:
            values: The tensor, ``[R, C]`` or ``[E, R, C]``.
            largest: Which of both.
        """
        pick = torch.amax if largest else torch.amin
        counts = self.counts(values.shape)
        matrices = values if values.ndim == 3 else values.unsqueeze(0)
        found = torch.stack([self._reduce_matrix(matrix, counts[-2:], largest=largest) for matrix in matrices])
        if values.ndim == 3 and self.block[0] == WHOLE:
            found = pick(found, 0, keepdim=True)
        return found.reshape(self.shape(values.shape))

    def _reduce_matrix(self, matrix: Tensor, counts: Sequence[int], *, largest: bool) -> Tensor:
        pick = torch.amax if largest else torch.amin
        lengths = [
            size if length == WHOLE else length for size, length in zip(matrix.shape, self.block[-2:], strict=True)
        ]
        missing = [length * count - size for size, length, count in zip(matrix.shape, lengths, counts, strict=True)]
        if any(missing):
            matrix = functional.pad(matrix, (0, missing[1], 0, missing[0]), value=-math.inf if largest else math.inf)
        return pick(matrix.reshape(counts[0], lengths[0], counts[1], lengths[1]), dim=(1, 3))
