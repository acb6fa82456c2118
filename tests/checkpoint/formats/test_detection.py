"""Logical tensors from headers: which stored tensors belong together, and what is refused under which name."""

from typing import Any

import pytest
import torch

from hcsmoe_hub.checkpoint.formats import LogicalTensor, logical_tensors
from hcsmoe_hub.checkpoint.tensors import DTYPES, StoredTensor
from hcsmoe_hub.errors import SourceError, UnsupportedModelError

FP8: dict[str, Any] = {
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "dtype": "bfloat16",
}
PLAIN = ("model.norm.weight", "BF16", (64,))
Header = tuple[str, str, tuple[int, ...]]


def read(config: dict[str, Any], *headers: Header) -> dict[str, LogicalTensor]:
    stored = {
        name: StoredTensor(name=name, dtype=DTYPES[dtype], shape=shape, shard="model.safetensors", offset=0)
        for name, dtype, shape in headers
    }
    found = logical_tensors(config, stored)
    parts = [part.name for logical in found.values() for part in logical.parts.values()]
    assert sorted(parts) == sorted(stored), "every stored tensor is a part of exactly one"
    assert sum(logical.nbytes for logical in found.values()) == sum(tensor.nbytes for tensor in stored.values())
    for logical in found.values():
        if logical.codec is not None:
            names, specs = logical.codec.part_names(logical.name), logical.codec.part_specs(logical.shape)
            assert {role: part.name for role, part in logical.parts.items()} == names
            assert {role: (part.dtype, part.shape) for role, part in logical.parts.items()} == specs
    return found


def shapes(found: dict[str, LogicalTensor]) -> dict[str, tuple[int, ...]]:
    return {name: logical.shape for name, logical in found.items()}


def test_plain_tensors_are_their_own_logical_tensors() -> None:
    found = read({}, PLAIN, ("a.weight", "F32", (3, 4)), ("a.table", "I64", (9, 2)))
    assert shapes(found) == {"model.norm.weight": (64,), "a.weight": (3, 4), "a.table": (9, 2)}
    assert all(logical.codec is None and list(logical.parts) == [""] for logical in found.values())


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E8M0", "U8"])
@pytest.mark.parametrize("scale", ["a.weight_scale_inv", "a.weight_scale", "a.scale"])
def test_deepseek_fp8_with_a_partial_last_block(scale: str, dtype: str) -> None:
    found = read(FP8, PLAIN, ("a.weight", "F8_E4M3", (576, 7168)), (scale, dtype, (5, 56)))
    assert shapes(found) == {"model.norm.weight": (64,), "a.weight": (576, 7168)}
    assert found["a.weight"].dtype == torch.bfloat16
    assert {role: part.name for role, part in found["a.weight"].parts.items()} == {"weight": "a.weight", "scale": scale}


def test_tensors_may_come_in_any_order() -> None:
    found = read(FP8, ("a.weight_scale_inv", "F32", (5, 56)), PLAIN, ("a.weight", "F8_E4M3", (576, 7168)))
    assert list(found) == ["model.norm.weight", "a.weight"]


def test_fused_experts_of_fp8() -> None:
    found = read(FP8, ("e.up_proj", "F8_E4M3", (4, 300, 200)), ("e.up_proj_scale_inv", "F32", (4, 3, 2)))
    assert shapes(found) == {"e.up_proj": (4, 300, 200)}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (576,), (576, 1)])
def test_scales_per_tensor_and_per_row_need_no_block_size(shape: tuple[int, ...]) -> None:
    found = read({}, ("a.weight", "F8_E4M3", (576, 70)), ("a.weight_scale", "F32", shape))
    assert shapes(found) == {"a.weight": (576, 70)}


def test_mxfp8_has_blocks_of_32() -> None:
    config = {"quantization_config": {"quant_method": "mxfp8"}}
    found = read(config, ("a.weight", "F8_E4M3", (576, 96)), ("a.weight_scale_inv", "U8", (576, 3)))
    assert shapes(found) == {"a.weight": (576, 96)}


@pytest.mark.parametrize("name", ["input_scale", "activation_scale"])
def test_static_scales_of_activations_belong_to_their_weight(name: str) -> None:
    found = read({}, ("a.weight", "F8_E4M3", (5, 7)), ("a.weight_scale", "F32", ()), (f"a.{name}", "F32", ()), PLAIN)
    codec = found["a.weight"].codec
    assert codec is not None
    assert codec.carried == (name,)
    assert found["a.weight"].parts[name].name == f"a.{name}"


def test_modelopt_fp8_is_plain_fp8() -> None:
    config = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
    found = read(config, ("a.weight", "F8_E4M3", (5, 7)), ("a.weight_scale", "F32", ()), ("a.input_scale", "F32", ()))
    assert shapes(found) == {"a.weight": (5, 7)}


def test_deepseek_v4_mixes_fp8_and_mxfp4() -> None:
    found = read(
        FP8,
        ("layers.3.attn.wq_a.weight", "F8_E4M3", (1024, 4096)),
        ("layers.3.attn.wq_a.scale", "F8_E8M0", (8, 32)),
        ("layers.3.ffn.experts.0.w1.weight", "I8", (2048, 2048)),
        ("layers.3.ffn.experts.0.w1.scale", "F8_E8M0", (2048, 128)),
        ("layers.3.ffn.gate.tid2eid", "I64", (1000, 6)),
        ("hc_head_scale", "F32", (1,)),
    )
    assert shapes(found) == {
        "layers.3.attn.wq_a.weight": (1024, 4096),
        "layers.3.ffn.experts.0.w1.weight": (2048, 4096),
        "layers.3.ffn.gate.tid2eid": (1000, 6),
        "hc_head_scale": (1,),
    }


def test_gpt_oss_is_seen_as_its_unquantised_checkpoint() -> None:
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    found = read(
        config,
        ("e.gate_up_proj_blocks", "U8", (32, 5760, 90, 16)),
        ("e.gate_up_proj_scales", "U8", (32, 5760, 90)),
        ("e.gate_up_proj_bias", "BF16", (32, 5760)),
    )
    assert shapes(found) == {"e.gate_up_proj": (32, 2880, 5760), "e.gate_up_proj_bias": (32, 5760)}


def compressed(**weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    return {"text_config": {"quantization_config": settings}}


@pytest.mark.parametrize(
    ("weights", "scale"),
    [
        ({"num_bits": 4, "group_size": 32, "strategy": "group"}, (2048, 224)),
        ({"num_bits": 4, "group_size": 128, "strategy": "group"}, (2048, 56)),
        ({"num_bits": 4, "group_size": None, "strategy": "channel"}, (2048, 1)),
    ],
)
@pytest.mark.parametrize("has_zero_points", [False, True])
def test_int4_of_kimi_k2_thinking(weights: dict[str, Any], scale: tuple[int, ...], has_zero_points: bool) -> None:
    zero_points = [("x.up_proj.weight_zero_point", "I32", (256, scale[1]))] if has_zero_points else []
    found = read(
        compressed(**weights),
        ("x.up_proj.weight_packed", "I32", (2048, 896)),
        ("x.up_proj.weight_scale", "BF16", scale),
        ("x.up_proj.weight_shape", "I32", (2,)),
        *zero_points,
    )
    assert shapes(found) == {"x.up_proj.weight": (2048, 7168)}


def test_compressed_tensors_fp8_and_int8_per_row() -> None:
    found = read(
        compressed(num_bits=8, type="float", strategy="channel"),
        ("a.weight", "F8_E4M3", (576, 70)),
        ("a.weight_scale", "BF16", (576, 1)),
        ("b.weight", "I8", (576, 70)),
        ("b.weight_scale", "BF16", (576, 1)),
    )
    assert shapes(found) == {"a.weight": (576, 70), "b.weight": (576, 70)}


def test_compressed_tensors_fp8_in_blocks() -> None:
    found = read(
        compressed(num_bits=8, type="float", strategy="block", block_structure=[128, 128]),
        ("a.weight", "F8_E4M3", (576, 300)),
        ("a.weight_scale", "BF16", (5, 3)),
    )
    assert shapes(found) == {"a.weight": (576, 300)}


@pytest.mark.parametrize("method", ["fp8", "gptq", "bitsandbytes", "mxfp4", "something-new"])
def test_a_config_left_over_from_another_checkpoint_is_ignored(method: str) -> None:
    config = {"quantization_config": {"quant_method": method, "weight_block_size": [128, 128]}}
    assert shapes(read(config, PLAIN, ("a.weight", "BF16", (5, 7)))) == {"model.norm.weight": (64,), "a.weight": (5, 7)}


@pytest.mark.parametrize("shape", [(4, 56), (5, 55), (6, 56), (56, 5)])
def test_scales_that_do_not_fit_are_reported_with_their_shapes(shape: tuple[int, int]) -> None:
    with pytest.raises(SourceError) as caught:
        read(FP8, ("a.weight", "F8_E4M3", (576, 7168)), ("a.weight_scale_inv", "F32", shape))
    assert "'a.weight' has the shape [576, 7168]" in caught.value.message
    assert f"'a.weight_scale_inv' have the shape {list(shape)}" in caught.value.message
    assert "128 x 128" in caught.value.message


def test_blocks_and_scales_of_mxfp4_that_differ_are_reported() -> None:
    with pytest.raises(SourceError, match=r"\[4, 8, 2, 16\].*\[4, 8, 3\]"):
        read({}, ("e.x_blocks", "U8", (4, 8, 2, 16)), ("e.x_scales", "U8", (4, 8, 3)))


@pytest.mark.parametrize(
    ("headers", "settings", "name", "hint"),
    [
        ([("a.qweight", "I32", (8, 8))], {"quant_method": "gptq", "bits": 4}, "GPTQ", "unquantised"),
        ([("a.qweight", "I32", (8, 8))], {"quant_method": "awq", "bits": 4}, "AWQ", "unquantised"),
        ([("a.qweight", "I32", (8, 8))], {"quant_method": "auto-round"}, "AutoRound", "unquantised"),
        ([("a.weight", "U8", (8, 1))], {"quant_method": "bitsandbytes"}, "bitsandbytes", "dequantize"),
        ([("a.W_q", "U8", (8, 8))], {"quant_method": "hqq"}, "HQQ", "unquantised"),
        ([("a.weight", "I8", (8, 8))], {"quant_method": "eetq"}, "EETQ", "unquantised"),
        ([("a.weight", "I8", (8, 8))], {"quant_method": "torchao"}, "torchao", "unquantised"),
        ([("a.weight", "I8", (8, 8))], {"quant_method": "quanto"}, "Quanto", "unquantised"),
        ([("a.weight", "U8", (8, 8))], {"quant_method": "gguf"}, "GGUF", "safetensors"),
        ([("a.weight", "U8", (8, 8))], {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt NVFP4", "BF16"),
        ([("a.weight", "U32", (8, 8))], {"group_size": 64, "bits": 4}, "MLX", "mlx_lm.convert"),
        ([("a.weight", "U8", (8, 8))], {"quant_method": "brand_new"}, "brand-new", "unquantised"),
        ([("a.weight", "U8", (8, 8)), ("a.weight_scale_2", "F32", ())], {}, "NVFP4", "BF16"),
        ([("a.weight", "U8", (8, 1)), ("a.weight.absmax", "F32", (8,))], {}, "bitsandbytes", "dequantize"),
        ([("a.qweight", "I32", (8, 8))], {}, "GPTQ or AWQ", "unquantised"),
    ],
)
def test_foreign_formats_are_refused_by_their_own_names(
    headers: list[Header], settings: dict[str, Any], name: str, hint: str
) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        read({"quantization_config": settings} if settings else {}, PLAIN, *headers)
    assert caught.value.message.replace("'", "").startswith(f"the weights are quantised with {name}")
    assert any(repr(header[0]) in caught.value.message for header in headers)
    assert hint in caught.value.hint


def test_mlx_is_recognised_by_its_own_key() -> None:
    config = {"quantization": {"group_size": 64, "bits": 4, "mode": "affine"}}
    with pytest.raises(UnsupportedModelError, match="MLX"):
        read(config, ("a.weight", "U32", (8, 8)), ("a.scales", "BF16", (8, 1)), ("a.biases", "BF16", (8, 1)))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        ({"format": "marlin-24"}, "marlin-24"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "rotated"),
    ],
)
def test_other_formats_of_compressed_tensors_are_refused(change: dict[str, Any], name: str) -> None:
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", **change}
    with pytest.raises(UnsupportedModelError, match=name):
        read({"quantization_config": settings}, ("a.weight_packed", "I32", (8, 8)))


@pytest.mark.parametrize(
    "headers",
    [
        [("a.weight", "F8_E4M3", (8, 8))],
        [("a.weight", "I8", (8, 8))],
        [("a.weight", "U8", (8, 8))],
        [("a.x_blocks", "U8", (2, 8, 2, 16))],
        [("a.weight_packed", "I32", (8, 8)), ("a.weight_scale", "BF16", (8, 2))],
        [("a.weight", "I8", (8, 8)), ("a.weight_scale", "BF16", (8, 1)), ("a.weight_zero_point", "I8", (8, 1))],
    ],
)
def test_codes_without_scales_are_refused(headers: list[Header]) -> None:
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    with pytest.raises(UnsupportedModelError, match="nothing says how to decode them"):
        read(config, *headers)


def test_values_have_the_dtype_of_the_unquantised_model() -> None:
    for dtype, expected in {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.bfloat16}.items():
        found = read({"torch_dtype": dtype}, ("a.weight", "F8_E4M3", (5, 7)), ("a.weight_scale", "F32", ()))
        assert found["a.weight"].dtype == expected
