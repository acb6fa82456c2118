"""Tiny checkpoints in the quantised formats and under the names of published ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from architectures import VOCABULARY, save_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, convert
from hcsmoe_hub.checkpoint.formats import Codec
from hcsmoe_hub.checkpoint.formats.carried import CarriedPart
from hcsmoe_hub.checkpoint.formats.grid import WHOLE, Grid
from hcsmoe_hub.checkpoint.formats.mxfp4 import Mxfp4Blocks
from hcsmoe_hub.checkpoint.formats.packed import PackedCodec
from hcsmoe_hub.checkpoint.formats.scaled import ScaledCodec
from hcsmoe_hub.report import ConversionReport

EXPERTS = 6
E4M3 = torch.float8_e4m3fn
# What the publishers leave in bfloat16.
UNQUANTIZED = ("norm", "embed", "lm_head", "gate.weight", "router", "bias", "sinks")


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def weight_bytes(folder: Path) -> int:
    """Bytes of every tensor of a checkpoint."""
    return sum(tensor.nbytes for tensor in stored(folder).values())


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are the same, bit by bit."""
    is_same_kind = (first.dtype, first.shape) == (second.dtype, second.shape)
    return is_same_kind and torch.equal(
        first.contiguous().view(-1).view(torch.uint8), second.contiguous().view(-1).view(torch.uint8)
    )


def rewrite(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    """Replaces a checkpoint's weights, and adds their quantisation to its config."""
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": quantization, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))


def quantize(folder: Path, codec_of: Callable[[str], Codec], quantization: dict[str, Any]) -> None:
    """Stores the linear weights of a checkpoint in a format, all others in bfloat16."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored(folder).items():
        if tensor.dim() < 2 or any(word in name for word in UNQUANTIZED):
            tensors[name] = tensor if "correction" in name else tensor.bfloat16()
            continue
        codec = codec_of(name)
        keys, values = codec.part_names(name), tensor.bfloat16()
        tensors |= {keys[role]: part for role, part in codec.encode(values).items()}
        for number, role in enumerate(codec.carried):
            tensors[keys[role]] = torch.tensor(0.01 * (len(name) + number + sum(map(ord, name)) % 97))
    rewrite(folder, tensors, quantization)


def deepseek_fp8(folder: Path, *, powers: bool = False) -> Path:
    """DeepSeek-V3: blocks of 128 x 128 in float32, 576 rows of ``kv_a_proj_with_mqa``, odd sizes of experts."""
    sizes = {"hidden_size": 160, "moe_intermediate_size": 200, "intermediate_size": 136}
    save_tiny("deepseek_v3", folder, kv_lora_rank=512, qk_rope_head_dim=64, **sizes)
    codec = ScaledCodec(
        code=E4M3, grid=Grid(block=(128, 128)), scale=torch.float32, scale_key="{name}_scale_inv", powers=powers
    )
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    quantize(folder, lambda name: codec, settings | ({"scale_fmt": "ue8m0"} if powers else {}))
    return folder


def qwen3_fp8(folder: Path) -> Path:
    """Qwen3: blocks of 128 x 128 in bfloat16."""
    save_tiny("qwen3_moe", folder, hidden_size=128, moe_intermediate_size=192)
    codec = ScaledCodec(code=E4M3, grid=Grid(block=(128, 128)), scale=torch.bfloat16, scale_key="{name}_scale_inv")
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    quantize(folder, lambda name: codec, settings)
    return folder


def qwen3_static(folder: Path) -> Path:
    """A scale per tensor and one for its activations, as static FP8 has them."""
    save_tiny("qwen3_moe", folder)
    extra = CarriedPart(
        role="input_scale", key="{module}input_scale", dtype=torch.float32, shape=(), is_per_expert=False
    )
    codec = ScaledCodec(
        code=E4M3,
        grid=Grid(block=(WHOLE, WHOLE), dropped=2),
        scale=torch.float32,
        scale_key="{name}_scale",
        extra=(extra,),
    )
    quantize(folder, lambda name: codec, {"quant_method": "modelopt", "quant_algo": "FP8"})
    return folder


def compressed(bits: int, kind: str, **weights: Any) -> dict[str, Any]:
    """The settings of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": kind, "symmetric": True, **weights}}
    style = "float-quantized" if kind == "float" else "pack-quantized"
    ignore = ["lm_head", "re:.*gate$"]
    return {
        "quant_method": "compressed-tensors",
        "format": style,
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "quantization_status": "compressed",
    }


def channel_fp8(folder: Path) -> Path:
    """FP8 with a scale per row, as compressed-tensors stores it."""
    save_tiny("qwen3_moe", folder)
    codec = ScaledCodec(code=E4M3, grid=Grid(block=(1, WHOLE)), scale=torch.bfloat16, scale_key="{name}_scale")
    quantize(folder, lambda name: codec, compressed(8, "float", strategy="channel"))
    return folder


def kimi_int4(folder: Path) -> Path:
    """INT4 in groups of 32, as in Kimi-K2-Thinking."""
    save_tiny(
        "deepseek_v3",
        folder,
        hidden_size=64,
        moe_intermediate_size=96,
        intermediate_size=64,
        q_lora_rank=32,
        kv_lora_rank=32,
        v_head_dim=16,
    )
    codec = PackedCodec(bits=4, grid=Grid(block=(1, 32)), scale=torch.bfloat16, size=torch.int32)
    quantize(folder, lambda name: codec, compressed(4, "int", strategy="group", group_size=32))
    return folder


def gpt_oss_mxfp4(folder: Path) -> Path:
    """gpt-oss: experts in MXFP4, all else in bfloat16."""
    save_tiny("gpt_oss", folder, hidden_size=64, intermediate_size=96)
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored(folder).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            keys = Mxfp4Blocks().part_names(name)
            tensors |= {keys[role]: part for role, part in Mxfp4Blocks().encode(tensor.bfloat16()).items()}
        else:
            tensors[name] = tensor.bfloat16()
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    rewrite(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": kept})
    return folder


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "deepseek-fp8": deepseek_fp8,
    "qwen3-fp8": qwen3_fp8,
    "static-fp8": qwen3_static,
    "channel-fp8": channel_fp8,
    "kimi-int4": kimi_int4,
    "gpt-oss-mxfp4": gpt_oss_mxfp4,
}


def run(source: Path, output: Path, experts: int | None, *, tokens: int = 72, **options: Any) -> ConversionReport:
    """Converts on random tokens; options of the method go to it."""
    ids = output.with_suffix(".npy")
    np.save(ids, np.random.default_rng(0).integers(3, VOCABULARY, (tokens // 12, 12)))
    return convert(source, wanted(output, experts, ids, **options))


def wanted(output: Path, experts: int | None, ids: Path, **options: Any) -> ConvertOptions:
    """The options of such a conversion."""
    outer = {name: options.pop(name) for name in ("dtype", "expert_width") if name in options}
    return ConvertOptions(
        experts=experts,
        output=output,
        device="cpu",
        calibration=CalibrationOptions(dataset=str(ids)),
        method=MethodOptions(**options),
        **outer,
    )
