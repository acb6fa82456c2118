"""Integers of four or eight bits, packed into words of 32: the ``pack-quantized`` format of compressed-tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hcsmoe_hub.checkpoint.formats.carried import stored_key
from hcsmoe_hub.checkpoint.formats.grid import Grid
from hcsmoe_hub.checkpoint.formats.logical import SCALE, WEIGHT
from hcsmoe_hub.checkpoint.formats.scales import divisors
from hcsmoe_hub.errors import SourceError

SHAPE, ZERO_POINT = "shape", "zero_point"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedCodec:
    """Words ``[R, C * bits / 32]``, the lowest bits first, of integers that are stored without their sign.

    A value is ``(code - zero point) * scale``. Zero points are packed like codes, along the rows. With zero points and
    eight bits, differences have nine, more than bfloat16 holds: of those, encoding restores the values, not the codes.

    Attributes:
        bits: Bits of a code: 4 or 8.
        grid: The blocks of a scale: groups of a row, or whole rows.
        scale: Dtype of the scales.
        size: Dtype in which the shape of the weight is stored next to it.
        has_zero_points: Whether there are zero points; without them they are 0.
        dtype: Dtype of the values.
    """

    bits: int
    grid: Grid
    scale: torch.dtype
    size: torch.dtype
    has_zero_points: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def carried(self) -> tuple[str, ...]:
        """Nothing is carried."""
        return ()

    @property
    def row_step(self) -> int:
        """Groups are whole; a scale per row takes any length."""
        return max(1, self.grid.block[-1])

    @property
    def per_word(self) -> int:
        """Codes in a word of 32 bits."""
        return 32 // self.bits

    @property
    def _bounds(self) -> tuple[int, int]:
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

    def part_names(self, name: str) -> dict[str, str]:
        """Stored key of every part, by role."""
        keys = {WEIGHT: "packed", SCALE: "scale", SHAPE: "shape"}
        if self.has_zero_points:
            keys[ZERO_POINT] = "zero_point"
        return {role: stored_key("{name}_" + key, name) for role, key in keys.items()}

    def part_specs(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every part, by role."""
        rows, columns = shape
        scales = self.grid.shape(shape)
        specs = {
            WEIGHT: (torch.int32, (rows, -(-columns // self.per_word))),
            SCALE: (self.scale, scales),
            SHAPE: (self.size, (2,)),
        }
        if self.has_zero_points:
            specs[ZERO_POINT] = (torch.int32, (-(-scales[0] // self.per_word), scales[1]))
        return specs

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Codes less zero points, times scales.

        Raises:
            SourceError: If the shape that is stored next to the weight is that of another.
        """
        rows, columns = (int(size) for size in parts[SHAPE])
        expected = self.part_specs((rows, columns))
        if any(tuple(parts[role].shape) != expected[role][1] for role in (WEIGHT, SCALE)):
            raise SourceError(
                f"packed weights of shape {list(parts[WEIGHT].shape)} with scales {list(parts[SCALE].shape)} "
                f"are said to have the shape {[rows, columns]}, which does not fit.",
                hint="download the checkpoint again",
            )
        codes = self._unpack(parts[WEIGHT])[:, :columns].float()
        if self.has_zero_points:
            codes -= self.grid.spread(self._zero_points(parts), codes.shape)
        scales = self.grid.per_matrix(parts[SCALE].float(), codes.shape)[0]
        return codes.mul_(self.grid.spread(scales, codes.shape)).to(self.dtype)

    def encode(self, values: Tensor, *, scale: Tensor | None = None) -> dict[str, Tensor]:
        """Values divided by scales, as the nearest codes; zero points are computed from the values as well."""
        zero_points = None
        lowest, highest = self.grid.reduce(values, largest=False).float(), self.grid.reduce(values).float()
        lowest, highest = lowest.clamp_max(0), highest.clamp_min(0)
        low, high = self._bounds
        if scale is None:
            span = highest - lowest if self.has_zero_points else 2 * torch.maximum(highest, -lowest)
            scale = (span / (high - low)).to(self.scale)
            scale = torch.where(scale == 0, torch.finfo(self.scale).eps, scale)
        if self.has_zero_points:
            zero_points = (low - lowest / scale.float()).round().clamp(low, high)
        return self._encode(values, scale, zero_points)

    def encode_as(self, values: Tensor, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encodes with the scales and the zero points of other parts."""
        return self._encode(values, parts[SCALE], self._zero_points(parts) if self.has_zero_points else None)

    def _encode(self, values: Tensor, scale: Tensor, zero_points: Tensor | None) -> dict[str, Tensor]:
        scales = self.grid.per_matrix(divisors(scale), values.shape)[0]
        codes = values.float() / self.grid.spread(scales, values.shape)
        parts = {SCALE: scale, SHAPE: torch.tensor(values.shape, dtype=self.size, device=values.device)}
        if zero_points is not None:
            codes += self.grid.spread(zero_points, values.shape)
            parts[ZERO_POINT] = self._pack(zero_points.T).T.contiguous()
        parts[WEIGHT] = self._pack(codes.round_().clamp_(*self._bounds))
        return parts

    def _zero_points(self, parts: Mapping[str, Tensor]) -> Tensor:
        return self._unpack(parts[ZERO_POINT].T)[:, : parts[SCALE].shape[0]].T.float()

    def _pack(self, codes: Tensor) -> Tensor:
        """Signed codes ``[R, C]`` to words."""
        missing = -codes.shape[1] % self.per_word
        unsigned = torch.nn.functional.pad(codes.to(torch.int64) - self._bounds[0], (0, missing))
        shifts = torch.arange(0, 32, self.bits, device=codes.device)
        words = (unsigned.unflatten(-1, (-1, self.per_word)) << shifts).sum(-1)
        # Words with the highest bit are negative numbers.
        return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)

    def _unpack(self, words: Tensor) -> Tensor:
        """Words to signed codes, those that only fill the last word included."""
        shifts = torch.arange(0, 32, self.bits, device=words.device, dtype=torch.int32)
        codes = (words.unsqueeze(-1) >> shifts) & ((1 << self.bits) - 1)
        return codes.flatten(-2) + self._bounds[0]
