"""The benchmarks of speed write checkpoints that can be converted, and relate a conversion to the machine's rates."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT

from hcsmoe_hub import plan
from hcsmoe_hub.options import CalibrationOptions, ConvertOptions

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    synthetic, speed, scaling = map(importlib.import_module, ("synthetic", "speed", "scaling"))

SIZES = {"hidden": 32, "width": 16, "layers": 2, "experts": 6, "active": 2, "heads": 4, "vocabulary": 64}


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_synthetic_checkpoint_can_be_converted(tmp_path: Path, family: str) -> None:
    size = synthetic.write_checkpoint(tmp_path, synthetic.Shape(family=family, **SIZES), sequences=2, length=8)
    ids = CalibrationOptions(dataset=str(tmp_path / synthetic.IDS_FILE))
    planned = plan(tmp_path, ConvertOptions(experts=3, calibration=ids, output=tmp_path / "result", device="cpu"))
    assert planned.calibration.tokens == 16
    assert planned.model.placement.unused == []
    assert size == 2 * planned.model.parameters


def test_ratios_leave_start_up_aside() -> None:
    taken = {
        "start_up": {"wall": 5.0, "user": 4.0, "system": 1.0},
        "layers": {"wall": 11.0, "user": 6.0, "system": 2.0},
        "whole": {"user": 8.0, "system": 2.0},
        "without_checkpoint": {"user": 6.0, "system": 2.0},
        "flops": 10**9,
    }
    limits = {"sequential_read_seconds": 1.0, "sequential_write_seconds": 2.0, "flops_per_second": 5e8}
    assert speed._ratios(taken, limits) == {"wall_to_disk": 2.0, "cpu_to_products": 1.5, "checkpoint_share": 0.25}


def test_a_product_rate_is_that_of_an_expert_and_its_tokens() -> None:
    assert speed.product_rate(synthetic.Shape(family="mixtral", **SIZES), torch.float32) > 0


def test_a_case_of_many_experts_keeps_the_size_of_a_layer() -> None:
    sizes = {case.experts: case.shape().width * case.experts for case in map(_of_experts, scaling.AXES["experts"])}
    assert sizes[8] == sizes[32] == sizes[128] == 8192
    assert sizes[512] == 2 * 8192, "no expert is narrower than 32"


def _of_experts(experts: int) -> Any:
    return scaling.Case(experts=experts)
