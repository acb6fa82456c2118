"""A tiny model, a sister of it, and conversions of one that follow the other."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import options, token_ids
from torch import Tensor

from hcsmoe_hub import convert
from hcsmoe_hub.options import CalibrationOptions, ConvertOptions, MethodOptions
from hcsmoe_hub.report import NEURONS_FILE, ConversionReport

IDS = token_ids(8, 32)
# The text of the sister is her own.
OTHER_IDS = IDS.flip(0).roll(7, 1)


def perturb(tensors: dict[str, Tensor]) -> None:
    """What fine-tuning does: every number changes, enough for other clusters."""
    generator = torch.Generator().manual_seed(3)
    for tensor in tensors.values():
        tensor += torch.randn(tensor.shape, generator=generator) * 0.2 * tensor.std()


def made(source: Path, output: Path, method: dict[str, Any], sizes: dict[str, Any] | None = None) -> ConversionReport:
    sizes = {"experts": None, **(sizes or {"experts": 5})}
    return convert(source, options(source, ids=IDS, output=output, method=MethodOptions(**method), **sizes))


def alike(source: Path, output: Path, result: Path | str, *, ids: Tensor = OTHER_IDS, **others: Any) -> ConvertOptions:
    # Where a file lies does not matter, but its name is that of a domain.
    file = output.parent / f"text of {output.name}" / "ids.npy"
    file.parent.mkdir(exist_ok=True)
    np.save(file, ids.numpy())
    return ConvertOptions(like=str(result), output=output, calibration=CalibrationOptions(dataset=str(file)), **others)


def choices(report: ConversionReport) -> list[tuple[list[int], list[int]]]:
    return [(layer.labels, layer.dominant) for layer in report.layers]


def neurons(folder: Path) -> dict[str, list[Any]]:
    with np.load(folder / NEURONS_FILE, allow_pickle=False) as arrays:
        return {name: arrays[name].tolist() for name in arrays}
