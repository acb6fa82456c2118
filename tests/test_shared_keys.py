"""Layers that share keys and values: they cannot be cut into micro-batches, nor leave their device."""

from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import EXPERTS, VOCABULARY, save_tiny
from torch import Tensor, nn

from hcsmoe_hub import CalibrationOptions, ConvertOptions, convert
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.planning.make import make_plan

SHARED_KEYS = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}


def options(folder: Path) -> ConvertOptions:
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(3, VOCABULARY, (6, 12)))
    calibration = CalibrationOptions(dataset=str(folder / "ids.npy"))
    return ConvertOptions(experts=3, output=folder / "result", device="cpu", batch_tokens=24, calibration=calibration)


def test_routing_of_layers_with_shared_keys_is_the_models_own(tmp_path: Path) -> None:
    model = save_tiny("gemma4_text", tmp_path / "source", **SHARED_KEYS)
    report = convert(tmp_path / "source", options(tmp_path))
    counts: list[list[int]] = []

    def count(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        counts.append(torch.bincount(inputs[1].flatten(), minlength=EXPERTS).tolist())

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(count)
    with torch.no_grad():
        model.base_model(torch.from_numpy(np.load(tmp_path / "ids.npy")), use_cache=False)
    assert [layer.usage for layer in report.layers] == counts


def test_shared_keys_are_refused_on_an_accelerator(tmp_path: Path) -> None:
    save_tiny("gemma4_text", tmp_path / "source", **SHARED_KEYS)
    with pytest.raises(PlanError, match="pass keys and values to each other") as caught:
        make_plan(LocalSource(tmp_path / "source"), options(tmp_path), device_room=10**12)
    assert "`device='cpu'`" in caught.value.hint
