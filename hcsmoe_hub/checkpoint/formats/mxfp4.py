"""MXFP4: codes of four bits, two to a byte, and one power of two for every 32 of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hcsmoe_hub.checkpoint.formats.carried import stored_key
from hcsmoe_hub.checkpoint.formats.logical import SCALE, WEIGHT
from hcsmoe_hub.checkpoint.formats.scales import power_scales, scale_values

BLOCK = 32
# The magnitudes of codes 0 to 7; codes 8 to 15 are their negatives, -0 among them.
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Where one code ends and the next begins; a tie goes to the even code.
LIMITS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def unpack(bytes_: Tensor) -> Tensor:
    """Bytes ``[..., n]`` to the numbers of their two codes, low half first: ``[..., 2n]`` in float32."""
    bytes_ = bytes_.view(torch.uint8)
    table = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)], device=bytes_.device)
    # Every byte at once: one look-up of a pair.
    pairs = torch.stack([table.repeat(16), table.repeat_interleave(16)], dim=-1)
    return pairs[bytes_.int()].flatten(-2)


def pack(numbers: Tensor) -> Tensor:
    """Numbers ``[..., 2n]`` in float32 to bytes ``[..., n]`` of their nearest codes, those beyond 6 saturated."""
    numbers = numbers.contiguous()
    limits = torch.tensor(LIMITS, device=numbers.device)
    below = torch.nextafter(limits, torch.zeros_like(limits))
    # A number at a limit belongs to the code below it, so where that one is odd the limit is moved.
    is_odd = torch.arange(len(LIMITS), device=numbers.device) % 2 == 1
    codes = torch.bucketize(numbers.abs(), torch.where(is_odd, below, limits), out_int32=True).to(torch.uint8)
    codes |= numbers.signbit().to(torch.uint8) << 3
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _encode_rows(values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of values ``[..., 32 g]`` to their bytes ``[..., 16 g]`` and scales ``[..., g]``."""
    blocks = values.float().unflatten(-1, (-1, BLOCK))
    if scale is None:
        scale = power_scales(blocks.abs().amax(-1), MAGNITUDES[-1], dtype)
    # Two steps, as the reciprocal of the smallest powers is beyond float32.
    return pack(blocks / scale_values(scale).unsqueeze(-1)).flatten(-2), scale


def _decode_rows(bytes_: Tensor, scale: Tensor) -> Tensor:
    return unpack(bytes_).unflatten(-1, (-1, BLOCK)).mul_(scale_values(scale).unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4Blocks:
    """MXFP4 as in gpt-oss: bytes ``[E, R, g, 16]`` and exponents ``[E, R, g]`` of a weight ``[E, 32 g, R]``.

    The model multiplies by these weights from the right, so the stored rows are its columns. Scales of 255 are not
    numbers; values with them decode to NaN and are not restored by encoding.

    Attributes:
        dtype: Dtype of the values.
    """

    dtype: torch.dtype = torch.bfloat16

    @property
    def carried(self) -> tuple[str, ...]:
        """Nothing is carried."""
        return ()

    @property
    def row_step(self) -> int:
        """Blocks are whole."""
        return BLOCK

    def part_names(self, name: str) -> dict[str, str]:
        """Stored key of every part, by role."""
        return {WEIGHT: f"{name}_blocks", SCALE: f"{name}_scales"}

    def part_specs(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every part, by role."""
        experts, columns, rows = shape
        blocks = (experts, rows, columns // BLOCK)
        return {WEIGHT: (torch.uint8, (*blocks, BLOCK // 2)), SCALE: (torch.uint8, blocks)}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Codes times powers of two, transposed."""
        experts, rows, groups, _ = parts[WEIGHT].shape
        values = torch.empty((experts, groups * BLOCK, rows), dtype=self.dtype, device=parts[WEIGHT].device)
        for expert, out in enumerate(values):
            out.copy_(_decode_rows(parts[WEIGHT][expert].flatten(-2), parts[SCALE][expert]).T)
        return values

    def encode(self, values: Tensor, *, scale: Tensor | None = None) -> dict[str, Tensor]:
        """Values divided by powers of two, as the nearest codes."""
        specs = self.part_specs(tuple(values.shape))
        parts = {role: torch.empty(shape, dtype=dtype, device=values.device) for role, (dtype, shape) in specs.items()}
        for expert, matrix in enumerate(values):
            given = None if scale is None else scale[expert]
            bytes_, scales = _encode_rows(matrix.T.contiguous(), given, torch.uint8)
            parts[WEIGHT][expert], parts[SCALE][expert] = bytes_.unflatten(-1, (-1, BLOCK // 2)), scales
        return parts

    def encode_as(self, values: Tensor, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encodes with the scales of other parts."""
        return self.encode(values, scale=parts[SCALE])


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4Rows:
    """MXFP4 as in the experts of DeepSeek-V4: bytes ``[R, C / 2]`` and exponents ``[R, C / 32]`` of ``[R, C]``.

    Scales of 255 are not numbers; values with them decode to NaN and are not restored by encoding.

    Attributes:
        code: Dtype of the bytes, signed or not.
        scale: Dtype of the exponents.
        scale_key: Key of the scales, made from that of the weight; see ``stored_key``.
        dtype: Dtype of the values.
    """

    code: torch.dtype
    scale: torch.dtype
    scale_key: str
    dtype: torch.dtype = torch.bfloat16

    @property
    def carried(self) -> tuple[str, ...]:
        """Nothing is carried."""
        return ()

    @property
    def row_step(self) -> int:
        """Blocks are whole."""
        return BLOCK

    def part_names(self, name: str) -> dict[str, str]:
        """Stored key of every part, by role."""
        return {WEIGHT: name, SCALE: stored_key(self.scale_key, name)}

    def part_specs(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every part, by role."""
        *rows, columns = shape
        return {WEIGHT: (self.code, (*rows, columns // 2)), SCALE: (self.scale, (*rows, columns // BLOCK))}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Codes times powers of two."""
        return _decode_rows(parts[WEIGHT], parts[SCALE]).to(self.dtype)

    def encode(self, values: Tensor, *, scale: Tensor | None = None) -> dict[str, Tensor]:
        """Values divided by powers of two, as the nearest codes."""
        bytes_, scale = _encode_rows(values, scale, self.scale)
        return {WEIGHT: bytes_.view(self.code), SCALE: scale}

    def encode_as(self, values: Tensor, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encodes with the scales of other parts."""
        return self.encode(values, scale=parts[SCALE])
