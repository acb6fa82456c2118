"""Formats that are recognised but not decoded, each with what helps."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hcsmoe_hub.checkpoint.formats.settings import QuantizationSettings
from hcsmoe_hub.checkpoint.tensors import StoredTensor
from hcsmoe_hub.errors import UnsupportedModelError

# What an unquantised checkpoint stores its weights, masks and tables of indices in.
_PLAIN = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.int64}

_UNQUANTISED = "convert the unquantised checkpoint of the same model, and quantise the result again"
_BITSANDBYTES = (
    "convert the unquantised checkpoint of the same model; if there is none, load this one in transformers, call "
    "'model.dequantize()' and save it"
)
_MLX = (
    "convert the original checkpoint, or run 'mlx_lm.convert --hf-path SOURCE --mlx-path NEW --dequantize' and "
    "convert NEW"
)
_NVFP4 = "convert the BF16 or FP8 checkpoint of the same model, and quantise the result again"
_GGUF = "convert the safetensors checkpoint that the GGUF files were made from"


@dataclass(frozen=True, slots=True)
class _Format:
    name: str
    hint: str = _UNQUANTISED


# By quant_method, with "-" for "_".
_METHODS: Mapping[str, _Format] = {
    "gptq": _Format("GPTQ"),
    "awq": _Format("AWQ"),
    "auto-round": _Format("AutoRound"),
    "bitsandbytes": _Format("bitsandbytes", _BITSANDBYTES),
    "hqq": _Format("HQQ"),
    "eetq": _Format("EETQ"),
    "torchao": _Format("torchao"),
    "quanto": _Format("Quanto"),
    "quark": _Format("Quark"),
    "gguf": _Format("GGUF", _GGUF),
    "mlx": _Format("MLX", _MLX),
    "modelopt": _Format("ModelOpt NVFP4", _NVFP4),
    "nvfp4": _Format("NVFP4", _NVFP4),
    "aqlm": _Format("AQLM"),
    "bitnet": _Format("BitNet"),
    "fouroversix": _Format("FourOverSix"),
    "fp-quant": _Format("FP-Quant"),
    "higgs": _Format("HIGGS"),
    "metal": _Format("Metal"),
    "sinq": _Format("SINQ"),
    "spqr": _Format("SpQR"),
    "vptq": _Format("VPTQ"),
    "exl2": _Format("EXL2"),
    "exl3": _Format("EXL3"),
    "gemma": _Format("Gemma's own quantisation"),
}
_DECODED = ("fp8", "mxfp8", "mxfp4", "fbgemm-fp8", "compressed-tensors", "")
# Endings of stored names that only one format has, whatever the config says; the first one that fits counts.
_ENDINGS: Mapping[str, _Format] = {
    ".qweight": _Format("GPTQ or AWQ"),
    ".absmax": _METHODS["bitsandbytes"],
    ".SCB": _METHODS["bitsandbytes"],
    ".W_q": _METHODS["hqq"],
    ".weight_scale_2": _METHODS["nvfp4"],
    ".weight_global_scale": _METHODS["nvfp4"],
    ".weight_g_idx": _Format("compressed-tensors with reordered columns"),
}


def refuse_foreign(settings: QuantizationSettings, stored: Mapping[str, StoredTensor]) -> None:
    """Refuses a checkpoint whose weights are in a format that is not decoded.

    A config may also be left over from another checkpoint: it only counts if the weights are not plain numbers.

    Raises:
        UnsupportedModelError: With the name of the format, and what helps.
    """
    foreign = [tensor for tensor in stored.values() if tensor.dtype not in _PLAIN and len(tensor.shape) > 1]
    if not foreign:
        return
    known = _METHODS.get(settings.method)
    # ModelOpt's FP8 is stored like everyone's.
    if settings.method == "modelopt" and str(settings.raw.get("quant_algo", "")).upper().startswith("FP8"):
        known = None
    if known is not None:
        raise _refusal(known, foreign[0])
    if settings.method != "modelopt" and settings.method not in _DECODED:
        raise _refusal(_Format(f"{settings.method!r}, which is not known"), foreign[0])
    for name, tensor in stored.items():
        ending = name[name.rfind(".") :]
        if ending in _ENDINGS:
            raise _refusal(_ENDINGS[ending], tensor)
        if tensor.dtype == torch.uint32:
            raise _refusal(_METHODS["mlx"], tensor)
    _refuse_compressed(settings, foreign[0])


def _refuse_compressed(settings: QuantizationSettings, example: StoredTensor) -> None:
    """Refuses what compressed-tensors adds to plain scales: other layouts, sparsity and rotations."""
    if settings.method != "compressed-tensors":
        return
    decoded = {"float-quantized", "naive-quantized", "int-quantized", "pack-quantized", "dense"}
    for name in sorted(settings.formats - decoded):
        raise _refusal(_Format(f"compressed-tensors, format {name}", _NVFP4 if "4" in name else _UNQUANTISED), example)
    sparsity = settings.raw.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        raise _refusal(_Format(f"compressed-tensors, sparsity {sparsity['format']}"), example)
    if settings.raw.get("transform_config"):
        raise _refusal(_Format("compressed-tensors with rotated weights"), example)


def _refusal(found: _Format, example: StoredTensor) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the weights are quantised with {found.name} ({example.name!r} and others), which hcsmoe does not decode.",
        hint=found.hint,
    )


def unexplained(tensor: StoredTensor, settings: QuantizationSettings) -> UnsupportedModelError:
    """The refusal of codes that nothing says how to read."""
    method = f"its quantization_config names {settings.method}" if settings.method else "it has no quantization_config"
    return UnsupportedModelError(
        f"tensor {tensor.name!r} in {tensor.shard} holds {tensor.dtype} codes of shape {list(tensor.shape)}, and "
        f"nothing says how to decode them: {method}, and no scales of a known kind are stored next to it.",
        hint="convert the unquantised checkpoint of the same model",
    )
