"""FP8 and MXFP4 sources written in bfloat16, against what transformers makes of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import VOCABULARY, save_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from hcsmoe_hub import CalibrationOptions, ConvertOptions, convert
from hcsmoe_hub.options import Dtype
from hcsmoe_hub.report import ConversionReport

BLOCK = 128
FP8_PROJECTIONS = (
    "gate_proj",
    "up_proj",
    "down_proj",
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "o_proj",
)


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Block-wise FP8 as DeepSeek stores it: values ``[O, I]`` and one inverse scale per 128 x 128 block."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    values, scales = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn), torch.zeros(rows, columns)
    for row in range(rows):
        for column in range(columns):
            block = (slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK))
            scales[row, column] = weight[block].abs().max() / 448
            values[block] = (weight[block] / scales[row, column]).to(torch.float8_e4m3fn)
    return values, scales


def rewrite(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    """Replaces a checkpoint's weights, and adds their quantisation to its config."""
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": quantization, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


@pytest.fixture(scope="module")
def fp8_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 with FP8 projections and bf16 norms, embeddings and router."""
    folder = tmp_path_factory.mktemp("fp8")
    save_tiny("deepseek_v3", folder, hidden_size=128, moe_intermediate_size=128, intermediate_size=128)
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored(folder).items():
        if name.split(".")[-2] in FP8_PROJECTIONS:
            tensors[name], tensors[name.replace(".weight", ".weight_scale_inv")] = quantize_fp8(tensor)
        else:
            tensors[name] = tensor if "refit" in name else tensor.bfloat16()
    settings = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK, BLOCK],
    }
    rewrite(folder, tensors, settings)
    return folder


@pytest.fixture(scope="module")
def mxfp4_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt-oss with MXFP4 experts: sixteen bytes for 32 values, and one exponent for each of these blocks."""
    folder = tmp_path_factory.mktemp("mxfp4")
    save_tiny("gpt_oss", folder, hidden_size=64, intermediate_size=64)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored(folder).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            blocks = (experts, outputs, inputs // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*blocks, 16), generator=generator, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(120, 126, blocks, generator=generator, dtype=torch.uint8)
        else:
            tensors[name] = tensor.bfloat16()
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    rewrite(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": kept})
    return folder


def run(source: Path, output: Path, experts: int) -> ConversionReport:
    ids = output.with_suffix(".npy")
    np.save(ids, np.random.default_rng(0).integers(3, VOCABULARY, (6, 12)))
    calibration = CalibrationOptions(dataset=str(ids))
    options = ConvertOptions(
        experts=experts, dtype=Dtype.BFLOAT16, output=output, device="cpu", calibration=calibration
    )
    return convert(source, options)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(24).view(2, 12), use_cache=False).logits


@pytest.mark.parametrize(("fixture", "settings"), [("fp8_source", FineGrainedFP8Config), ("mxfp4_source", Mxfp4Config)])
def test_keeping_every_expert_gives_the_dequantised_model(
    fixture: str, settings: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(fixture)
    run(source, tmp_path / "result", 6)
    config = json.loads((tmp_path / "result" / "config.json").read_text())
    assert "quantization_config" not in config
    result, info = AutoModelForCausalLM.from_pretrained(tmp_path / "result", output_loading_info=True)
    assert not any(info.values()), info
    expected = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings(dequantize=True), dtype=torch.bfloat16
    )
    assert torch.equal(logits(result), logits(expected))


@pytest.mark.parametrize("fixture", ["fp8_source", "mxfp4_source"])
def test_merged_result_is_plain_bf16_under_the_unquantised_names(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    report = run(request.getfixturevalue(fixture), tmp_path / "result", 3)
    tensors = stored(tmp_path / "result")
    assert not [name for name in tensors if name.endswith(("_scale_inv", "_blocks", "_scales"))]
    assert {tensor.dtype for name, tensor in tensors.items() if "refit" not in name} == {torch.bfloat16}
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "result", output_loading_info=True)
    assert not any(info.values()), info
    assert any("written in bfloat16" in warning for warning in report.warnings)
