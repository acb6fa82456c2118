"""A conversion matches the published code of HC-SMoE: usage, mean outputs, clusters, merged weights.

``tests/golden/README.md`` says where the figures come from.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from places import GOLDEN
from safetensors.torch import load_file
from torch import Tensor

from hcsmoe_hub.convert import convert
from hcsmoe_hub.observation.statistics_file import StatisticsFile
from hcsmoe_hub.options import CalibrationOptions, ConvertOptions, Linkage, Merge, MethodOptions
from hcsmoe_hub.report import ConversionReport

LAYERS = 4
TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one conversion reported, wrote, and computed on the way."""

    report: ConversionReport
    weights: dict[str, Tensor]
    mean_outputs_LEH: Tensor


Convert = Callable[..., Result]


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    """Statistics and merged weights of the reference."""
    return load_file(GOLDEN / "reference.safetensors")


@pytest.fixture(scope="module")
def labels() -> dict[str, list[list[int]]]:
    """Labels by linkage and K."""
    return json.loads((GOLDEN / "labels.json").read_text())


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """Converts the golden model; every choice of options once."""

    @cache
    def run(experts: int, linkage: Linkage, merge: Merge) -> Result:
        folder = tmp_path_factory.mktemp("golden")
        options = ConvertOptions(
            experts=experts,
            method=MethodOptions(linkage=linkage, merge=merge),
            calibration=CalibrationOptions(dataset=str(GOLDEN / "calib.npy")),
            output=folder / "result",
            statistics=folder / "statistics",
            device="cpu",
        )
        assert options.statistics is not None
        report = convert(GOLDEN / "mixtral", options)
        statistics = StatisticsFile(options.statistics)
        outputs_LEH = torch.stack([statistics.layer(layer).outputs_EH for layer in range(LAYERS)])
        assert options.output is not None
        weights = load_file(options.output / "model.safetensors")
        return Result(report=report, weights=weights, mean_outputs_LEH=outputs_LEH)

    return run


def relative_errors(found: Tensor, expected: Tensor) -> Tensor:
    """``||found - expected|| / ||expected||`` of every row, in float64."""
    found, expected = found.double(), expected.double()
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


def test_the_router_chose_every_expert_exactly_as_often(converted: Convert, reference: dict[str, Tensor]) -> None:
    layers = converted(4, Linkage.AVERAGE, Merge.FREQUENCY).report.layers
    assert [layer.usage for layer in layers] == reference["usage"].tolist()


def test_the_mean_output_of_every_expert_is_the_same(converted: Convert, reference: dict[str, Tensor]) -> None:
    found = converted(4, Linkage.AVERAGE, Merge.FREQUENCY).mean_outputs_LEH
    errors = relative_errors(found, reference["mean_expert_output"])
    assert errors.shape == (LAYERS, 8)
    assert errors.max() < TOLERANCE


@pytest.mark.parametrize("experts", [4, 2])
@pytest.mark.parametrize("linkage", [linkage for linkage in Linkage if linkage is not Linkage.LOSS])
def test_the_experts_of_every_layer_form_the_same_clusters(
    converted: Convert, labels: dict[str, list[list[int]]], linkage: Linkage, experts: int
) -> None:
    layers = converted(experts, linkage, Merge.FREQUENCY).report.layers
    assert [layer.labels for layer in layers] == labels[f"{linkage}.{experts}"]


@pytest.mark.parametrize(("merge", "experts"), [(Merge.FREQUENCY, 4), (Merge.FREQUENCY, 2), (Merge.AVERAGE, 4)])
def test_the_merged_weights_are_the_same(
    converted: Convert, reference: dict[str, Tensor], merge: Merge, experts: int
) -> None:
    weights = converted(experts, Linkage.AVERAGE, merge).weights
    for matrix in ("w1", "w2", "w3"):
        merged = torch.stack(
            [
                weights[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"]
                for layer in range(LAYERS)
                for expert in range(experts)
            ]
        ).unflatten(0, (LAYERS, experts))
        products = merged.double() @ reference[f"probe.{merged.shape[-1]}"]
        assert relative_errors(products, reference[f"merged.{merge}.{experts}.{matrix}"]).max() < TOLERANCE, matrix


def test_the_figures_distinguish_the_merges(reference: dict[str, Tensor]) -> None:
    # Otherwise the comparison above would prove nothing about the weights of the members.
    for matrix in ("w1", "w2", "w3"):
        frequency, average = reference[f"merged.frequency.4.{matrix}"], reference[f"merged.average.4.{matrix}"]
        assert relative_errors(frequency, average).max() > 1000 * TOLERANCE
