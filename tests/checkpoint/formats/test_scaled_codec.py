"""FP8 and INT8: every code comes back, odd sizes, every kind of scale, and the error of new codes."""

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import FineGrainedFP8Config

from hcsmoe_hub.checkpoint.formats.grid import WHOLE, Grid
from hcsmoe_hub.checkpoint.formats.scaled import ScaledCodec

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
BLOCKS = Grid(block=(128, 128))


def codec(
    grid: Grid = BLOCKS, code: torch.dtype = E4M3, scale: torch.dtype = torch.float32, **more: bool
) -> ScaledCodec:
    return ScaledCodec(code=code, grid=grid, scale=scale, scale_key="{name}_scale_inv", **more)


def finite_codes(dtype: torch.dtype) -> Tensor:
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype)
    return codes if not dtype.is_floating_point else codes[codes.float().isfinite()]


def random_values(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.rand(shape[-1], generator=generator)).bfloat16()


def test_a_format_has_a_finite_number_of_codes() -> None:
    assert [len(finite_codes(dtype)) for dtype in (E4M3, E5M2, torch.int8)] == [254, 248, 256]


@pytest.mark.parametrize("code", [E4M3, E5M2, torch.int8])
@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, E8M0])
def test_every_finite_code_comes_back_under_every_scale(code: torch.dtype, scale: torch.dtype) -> None:
    codes = finite_codes(code)
    if scale in (torch.uint8, E8M0):
        # 2**-90 to 2**90; beyond, products leave the range of bfloat16.
        scales = torch.arange(37, 218, dtype=torch.int16).to(torch.uint8).view(scale)
    else:
        scales = (torch.linspace(1.0, 2.0, 181) * 0.003).to(scale)
    grid = Grid(block=(1, WHOLE))
    parts = {"weight": codes.expand(181, -1).contiguous(), "scale": scales.view(181, 1)}
    rows = codec(grid, code, scale)
    again = rows.encode_as(rows.decode(parts), parts)
    assert torch.equal(again["weight"].view(torch.uint8), parts["weight"].view(torch.uint8))
    assert again["scale"].view(torch.uint8).equal(parts["scale"].view(torch.uint8))


def test_negative_zero_stays_negative() -> None:
    parts = {"weight": torch.tensor([[0x80, 0x00]], dtype=torch.uint8).view(E4M3), "scale": torch.ones(1, 1)}
    values = codec().decode(parts)
    assert values.signbit().tolist() == [[True, False]]
    assert codec().encode_as(values, parts)["weight"].view(torch.uint8).tolist() == [[0x80, 0x00]]


def test_codes_that_are_no_numbers_decode_to_nan() -> None:
    parts = {"weight": torch.tensor([[0x7F, 0xFF]], dtype=torch.uint8).view(E4M3), "scale": torch.ones(1, 1)}
    assert codec().decode(parts).isnan().all()


@pytest.mark.parametrize("shape", [(576, 256), (100, 70), (1, 1), (128, 128), (129, 300), (3, 100, 70), (2, 130, 260)])
@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, E8M0])
def test_values_are_codes_times_the_scale_of_their_block(shape: tuple[int, ...], scale: torch.dtype) -> None:
    blocks = codec(Grid(block=(1, 128, 128) if len(shape) == 3 else (128, 128)), scale=scale)
    parts = blocks.encode(random_values(*shape))
    assert {role: (part.dtype, part.shape) for role, part in parts.items()} == blocks.part_specs(shape)
    values = blocks.decode(parts)
    for index in torch.cartesian_prod(*(torch.arange(0, size, max(1, size // 7)) for size in shape)):
        *expert, row, column = index.tolist() if len(shape) > 1 else [index.item()]
        factor = parts["scale"].float()[(*expert, row // 128, column // 128)]
        expected = (parts["weight"].float()[(*expert, row, column)] * factor).bfloat16()
        assert values[(*expert, row, column)] == expected


@pytest.mark.parametrize("shape", [(256, 384), (2, 256, 128)])
@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, E8M0])
def test_whole_blocks_are_decoded_as_transformers_does(shape: tuple[int, ...], scale: torch.dtype) -> None:
    blocks = codec(Grid(block=(1, 128, 128) if len(shape) == 3 else (128, 128)), scale=scale)
    parts = blocks.encode(random_values(*shape))
    expected = Fp8Dequantize(None)._dequantize_one(parts["weight"], parts["scale"], torch.bfloat16)
    assert torch.equal(blocks.decode(parts), expected)


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_whole_blocks_are_encoded_as_transformers_does(scale_fmt: str) -> None:
    settings = FineGrainedFP8Config(weight_block_size=(128, 128), scale_fmt=scale_fmt)
    quantizer = FineGrainedFP8HfQuantizer(settings, pre_quantized=False)
    values = random_values(256, 384)
    expected = Fp8Quantize(quantizer)._quantize_one("x.weight", values)
    found = codec(scale=E8M0 if scale_fmt == "ue8m0" else torch.float32).encode(values)
    assert torch.allclose(found["scale"].float(), expected["x.weight_scale_inv"].float(), rtol=1e-6)
    different = found["weight"].view(torch.uint8) != expected["x.weight"].view(torch.uint8)
    # transformers divides by a scale that it has rounded once more.
    assert different.float().mean() < 1e-4


@pytest.mark.parametrize(
    ("shape", "scales", "block"),
    [
        ((576, 256), (5, 2), (128, 128)),
        ((100, 70), (), (WHOLE, WHOLE)),
        ((100, 70), (1,), (WHOLE, WHOLE)),
        ((100, 70), (1, 1), (WHOLE, WHOLE)),
        ((100, 70), (100,), (1, WHOLE)),
        ((100, 70), (100, 1), (1, WHOLE)),
        ((3, 100, 70), (3,), (1, WHOLE, WHOLE)),
        ((3, 100, 70), (3, 1, 1), (1, WHOLE, WHOLE)),
        ((3, 100, 70), (3, 100), (1, 1, WHOLE)),
        ((3, 100, 70), (3, 1, 70), (1, WHOLE, 1)),
        ((3, 100, 70), (), (WHOLE, WHOLE, WHOLE)),
        ((3, 300, 200), (3, 3, 2), (1, 128, 128)),
    ],
)
def test_shapes_say_which_values_a_scale_belongs_to(
    shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, ...]
) -> None:
    grid = Grid.between(shape, scales, [[128], [128]])
    assert grid is not None
    assert grid.block == block
    assert grid.shape(shape) == scales
    parts = codec(grid).encode(random_values(*shape))
    assert parts["scale"].shape == scales
    values = codec(grid).decode(parts)
    again = codec(grid).encode_as(values, parts)
    assert again["weight"].view(torch.uint8).equal(parts["weight"].view(torch.uint8))


@pytest.mark.parametrize(("shape", "scales"), [((576, 256), (4, 2)), ((576, 256), (2, 5)), ((192, 128), (2, 3))])
def test_scales_that_fit_no_block_are_not_guessed(shape: tuple[int, ...], scales: tuple[int, ...]) -> None:
    assert Grid.between(shape, scales, [[128], [128]]) is None


def test_192_rows_in_blocks_of_128_are_not_two_blocks_of_96() -> None:
    grid = Grid.between((192, 128), (2, 1), [[128], [128]])
    assert grid is not None
    parts = {"weight": torch.ones(192, 128).to(E4M3), "scale": torch.tensor([[1.0], [2.0]])}
    assert codec(grid).decode(parts)[:, 0].tolist() == [1.0] * 128 + [2.0] * 64


@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize("code", [E4M3, E5M2])
def test_new_codes_are_the_nearest_ones(code: torch.dtype, powers: bool) -> None:
    values = random_values(300, 200)
    blocks = codec(code=code, powers=powers)
    parts = blocks.encode(values)
    decoded = blocks.decode(parts).float()
    scale = blocks.grid.spread(parts["scale"], values.shape)
    # Half of the distance between two codes, and the rounding to bfloat16.
    bits = {E4M3: 3, E5M2: 2}[code]
    bound = values.float().abs() * (2.0 ** -(bits + 1) + 2.0**-8) + scale * torch.finfo(code).tiny
    assert ((decoded - values.float()).abs() <= bound).all()


def test_power_of_two_scales_are_the_smallest_without_overflow() -> None:
    largest = torch.tensor([448.0, 449.0, 447.0, 896.0, 1.0])
    values = largest.view(5, 1).bfloat16().float()
    scales = codec(Grid(block=(1, WHOLE)), powers=True).encode(values)["scale"].flatten()
    expected = torch.exp2(torch.ceil(torch.log2(values.flatten() / 448)))
    assert torch.equal(scales, expected)


@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, E8M0])
@pytest.mark.parametrize("code", [E4M3, E5M2, torch.int8])
def test_a_block_of_zeros_stays_zero(scale: torch.dtype, code: torch.dtype) -> None:
    blocks = codec(code=code, scale=scale)
    parts = blocks.encode(torch.zeros(130, 130, dtype=torch.bfloat16))
    assert torch.equal(blocks.decode(parts), torch.zeros(130, 130, dtype=torch.bfloat16))


def test_scales_of_zero_give_zeros() -> None:
    parts = {"weight": torch.zeros(2, 2).to(E4M3), "scale": torch.zeros(1, 1)}
    values = codec().decode(parts)
    assert codec().encode_as(values, parts)["weight"].view(torch.uint8).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, torch.uint8])
def test_the_smallest_and_the_largest_numbers_stay_finite(scale: torch.dtype) -> None:
    info = torch.finfo(torch.bfloat16)
    for number in (info.tiny, info.smallest_normal / 64, 2.0**100):
        blocks = codec(scale=scale)
        parts = blocks.encode(torch.full((4, 4), number, dtype=torch.bfloat16))
        assert parts["weight"].float().isfinite().all()
        assert blocks.decode(parts).isfinite().all()


def test_values_beyond_given_scales_saturate() -> None:
    parts = codec().encode(torch.tensor([[1000.0, -1000.0, 449.0]]), scale=torch.ones(1, 1))
    assert parts["weight"].float().tolist() == [[448.0, -448.0, 448.0]]
