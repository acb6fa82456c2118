"""MXFP4: every byte comes back, the layouts of gpt-oss and DeepSeek-V4, and the rounding of new codes."""

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from hcsmoe_hub.checkpoint.formats.mxfp4 import MAGNITUDES, Mxfp4Blocks, Mxfp4Rows, pack, unpack

ROWS = Mxfp4Rows(code=torch.int8, scale=torch.float8_e8m0fnu, scale_key="{module}scale")


def every_byte() -> Tensor:
    return torch.arange(256, dtype=torch.int16).to(torch.uint8)


def random_values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_every_byte_comes_back() -> None:
    assert torch.equal(pack(unpack(every_byte())), every_byte())


def test_the_low_half_of_a_byte_comes_first_and_has_its_sign_on_top() -> None:
    assert unpack(torch.tensor([0x71, 0x9F], dtype=torch.uint8)).tolist() == [0.5, 6.0, -6.0, -0.5]


def test_negative_zero_stays_negative() -> None:
    assert pack(torch.tensor([-0.0, 0.0])).tolist() == [0x08]


@pytest.mark.parametrize("code", range(7))
def test_ties_go_to_the_even_code(code: int) -> None:
    middle = (MAGNITUDES[code] + MAGNITUDES[code + 1]) / 2
    even = code if code % 2 == 0 else code + 1
    below, above = torch.nextafter(torch.tensor([middle] * 2), torch.tensor([0.0, 9.0])).tolist()
    found = pack(torch.tensor([middle, -middle, below, above]))
    assert found.tolist() == [even | (8 | even) << 4, code | (code + 1) << 4]


def test_numbers_beyond_the_largest_code_saturate() -> None:
    assert unpack(pack(torch.tensor([6.1, -1e30]))).tolist() == [6.0, -6.0]


def test_every_byte_of_gpt_oss_comes_back_under_every_scale() -> None:
    # 2**-120 to 2**120; beyond, products leave the range of bfloat16.
    scales = torch.arange(7, 248, dtype=torch.int16).to(torch.uint8)
    blocks = every_byte().view(1, 1, 16, 16).expand(1, 241, 16, 16).contiguous()
    parts = {"weight": blocks, "scale": scales.view(1, 241, 1).expand(1, 241, 16).contiguous()}
    values = Mxfp4Blocks().decode(parts)
    assert values.shape == (1, 512, 241)
    again = Mxfp4Blocks().encode_as(values, parts)
    assert all(torch.equal(again[role], parts[role]) for role in parts)


def test_gpt_oss_is_decoded_as_transformers_does() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 70, 5, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 150, (3, 70, 5), generator=generator, dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(Mxfp4Blocks().decode({"weight": blocks, "scale": scales}), expected)


@pytest.mark.parametrize("shape", [(70, 96), (3, 5, 64)])
def test_deepseek_v4_is_decoded_as_transformers_does(shape: tuple[int, ...]) -> None:
    parts = ROWS.encode(random_values(*shape))
    assert {role: (part.dtype, part.shape) for role, part in parts.items()} == ROWS.part_specs(shape)
    expected = Fp8Dequantize(None)._dequantize_one(parts["weight"], parts["scale"], torch.bfloat16)
    assert torch.equal(ROWS.decode(parts), expected)
    again = ROWS.encode_as(ROWS.decode(parts), parts)
    assert torch.equal(again["weight"], parts["weight"])


def test_exponents_are_the_smallest_that_keep_the_largest_value() -> None:
    values = torch.zeros(6, 32)
    values[:, 0] = torch.tensor([6.0, 6.5, 3.0, 4.0, 96.0, 0.0])
    scales = Mxfp4Rows(code=torch.uint8, scale=torch.uint8, scale_key="{module}scale").encode(values)["scale"]
    assert (scales.flatten().int() - 127).tolist() == [0, 1, -1, 0, 4, 0]


def test_encoding_what_was_decoded_changes_nothing_even_with_new_scales() -> None:
    values = ROWS.decode(ROWS.encode(random_values(64, 256)))
    assert torch.equal(ROWS.decode(ROWS.encode(values)), values)


def test_new_codes_are_within_half_a_step() -> None:
    values = random_values(64, 256)
    parts = ROWS.encode(values)
    scale = parts["scale"].float().repeat_interleave(32, 1)
    # Steps are 0.5 up to 2, 1 up to 4, and 2 up to 6.
    magnitude = values.float().abs() / scale
    step = torch.where(magnitude <= 2, 0.5, torch.where(magnitude <= 4, 1.0, 2.0))
    assert (magnitude <= 6).all()
    assert ((ROWS.decode(parts).float() - values.float()).abs() <= scale * step / 2).all()


@pytest.mark.parametrize("number", [0.0, torch.finfo(torch.bfloat16).tiny, 2.0**100])
def test_extreme_blocks_stay_finite(number: float) -> None:
    values = torch.full((2, 32), number, dtype=torch.bfloat16)
    decoded = ROWS.decode(ROWS.encode(values))
    assert decoded.isfinite().all()
    assert torch.equal(decoded[0, :1] == 0, values[0, :1] == 0)


def test_the_layout_of_gpt_oss_is_transposed() -> None:
    values = random_values(2, 64, 48)
    parts = Mxfp4Blocks().encode(values)
    assert {role: (part.dtype, part.shape) for role, part in parts.items()} == Mxfp4Blocks().part_specs((2, 64, 48))
    assert parts["weight"].shape == (2, 48, 2, 16)
    flat = Mxfp4Rows(code=torch.uint8, scale=torch.uint8, scale_key="").encode(values.transpose(1, 2))
    assert torch.equal(parts["weight"].flatten(-2), flat["weight"])
    assert torch.equal(parts["scale"], flat["scale"])
