"""Weights of one byte per value and their scales: FP8 in all its variants, and plain INT8."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hcsmoe_hub.checkpoint.formats.carried import CarriedPart, stored_key
from hcsmoe_hub.checkpoint.formats.grid import WHOLE, Grid
from hcsmoe_hub.checkpoint.formats.logical import SCALE, WEIGHT
from hcsmoe_hub.checkpoint.formats.scales import divisors, make_scales, scale_values


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledCodec:
    """Codes of one byte, each multiplied by the scale of its block.

    Codes that are not finite numbers (0x7F and 0xFF of e4m3; of e5m2, those from 0x7C and 0xFC on) decode to NaN or
    infinity and are not restored by encoding; a sound checkpoint has none.

    Attributes:
        code: Dtype of the codes.
        grid: The blocks.
        scale: Dtype of the scales; bytes hold exponents of two.
        scale_key: Key of the scales, made from that of the weight; see ``stored_key``.
        powers: Whether scales are powers of two although their dtype could hold others.
        dtype: Dtype of the values.
        extra: Parts that are carried along.
    """

    code: torch.dtype
    grid: Grid
    scale: torch.dtype
    scale_key: str
    powers: bool = False
    dtype: torch.dtype = torch.bfloat16
    extra: tuple[CarriedPart, ...] = ()

    @property
    def carried(self) -> tuple[str, ...]:
        """Roles of the parts that are neither decoded nor encoded."""
        return tuple(part.role for part in self.extra)

    @property
    def row_step(self) -> int:
        """Groups of a single row are whole; the last one of blocks of several rows may be a partial one."""
        rows, columns = self.grid.block[-2:]
        return columns if rows == 1 and columns != WHOLE else 1

    def part_names(self, name: str) -> dict[str, str]:
        """Stored key of every part, by role."""
        carried = {part.role: stored_key(part.key, name) for part in self.extra}
        return {WEIGHT: name, SCALE: stored_key(self.scale_key, name), **carried}

    def part_specs(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every part, by role."""
        carried = {part.role: (part.dtype, part.full_shape(shape)) for part in self.extra}
        return {WEIGHT: (self.code, tuple(shape)), SCALE: (self.scale, self.grid.shape(shape)), **carried}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Codes times scales."""
        codes = parts[WEIGHT]
        values = torch.empty(codes.shape, dtype=self.dtype, device=codes.device)
        scales = self.grid.per_matrix(scale_values(parts[SCALE]), codes.shape)
        for matrix, scale, out in zip(_matrices(codes), scales, _matrices(values), strict=True):
            out.copy_(matrix.float().mul_(self.grid.spread(scale, matrix.shape)))
        return values

    def encode(self, values: Tensor, *, scale: Tensor | None = None) -> dict[str, Tensor]:
        """Values divided by scales, as the nearest codes."""
        if scale is None:
            largest = torch.maximum(self.grid.reduce(values), -self.grid.reduce(values, largest=False)).float()
            scale = make_scales(largest, self._scale_limit, self.scale, powers=self.powers)
        codes = torch.empty(values.shape, dtype=self.code, device=values.device)
        scales = self.grid.per_matrix(divisors(scale), values.shape)
        for matrix, factor, out in zip(_matrices(values), scales, _matrices(codes), strict=True):
            out.copy_(self._round(matrix.float() / self.grid.spread(factor, matrix.shape)))
        return {WEIGHT: codes, SCALE: scale}

    def encode_as(self, values: Tensor, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encodes with the scales of other parts."""
        return self.encode(values, scale=parts[SCALE])

    @property
    def _scale_limit(self) -> float:
        # compressed-tensors spreads the largest magnitude over half of all codes of an integer: 127.5.
        return torch.finfo(self.code).max if self.code.is_floating_point else 127.5

    def _round(self, scaled: Tensor) -> Tensor:
        if self.code.is_floating_point:
            limit = torch.finfo(self.code).max
            return scaled.clamp_(-limit, limit)
        return scaled.round_().clamp_(-128, 127)


def _matrices(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 3 else tensor.unsqueeze(0)
