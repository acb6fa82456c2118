"""Fix-Dom and ZipIt give what the published code of HC-SMoE gives, neuron by neuron.

``tests/golden/README.md`` says where the figures come from.
"""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from places import GOLDEN
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hcsmoe_hub.methods.clustering import Clusters, Grouping
from hcsmoe_hub.methods.merging import MergeGroups, member_shares, merge_experts
from hcsmoe_hub.model.expert_kinds import experts_of, is_experts_module
from hcsmoe_hub.observation.sample import NeuronSample
from hcsmoe_hub.options import Features, Merge, MethodOptions
from hcsmoe_hub.recipe.resolve import resolve

# The reference rounds the weights of a group in Fix-Dom to float16, whose precision is 4.9e-4.
TOLERANCE = {Merge.FIX_DOM: 2.5e-4, Merge.ZIPIT: 1e-5}

MergeAll = Callable[[Merge, Features], dict[str, Tensor]]


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    """Merged weights and dominant experts of the reference."""
    return load_file(GOLDEN / "reference.safetensors")


@pytest.fixture(scope="module")
def merge_all(reference: dict[str, Tensor]) -> MergeAll:
    """Merges every layer of the golden model with the clusters of the reference; every merge once."""
    labels = json.loads((GOLDEN / "labels.json").read_text())["average.4"]
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "mixtral", dtype=torch.float32).eval()
    seen: list[tuple[Any, tuple[Tensor, ...]]] = []

    def remember(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append((module, inputs))

    for module in model.modules():
        if is_experts_module(module):
            module.register_forward_pre_hook(remember)
    with torch.no_grad():
        model.base_model(torch.from_numpy(np.load(GOLDEN / "calib.npy")), use_cache=False)

    @cache
    def run(merge: Merge, features: Features) -> dict[str, Tensor]:
        layers = []
        for (module, inputs), layer_labels, dominants in zip(seen, labels, reference["dominant.4"], strict=True):
            clusters = Clusters.of(layer_labels)
            tokens_TH, index_TK, weight_TK = inputs
            layers.append(
                merge_experts(
                    {name: parameter.data for name, parameter in module.named_parameters()},
                    experts_of(module).neurons,
                    groups=MergeGroups(
                        clusters=clusters,
                        dominants=dominants.tolist(),
                        share_EC=member_shares(Grouping(clusters=clusters), merge),
                    ),
                    recipe=resolve(MethodOptions(merge=merge, features=features)),
                    sample=NeuronSample(
                        experts=experts_of(module), tokens_TH=tokens_TH, index_TK=index_TK, weight_TK=weight_TK
                    ),
                ).tensors
            )
        gate_up = torch.stack([layer["gate_up_proj"] for layer in layers])
        down = torch.stack([layer["down_proj"] for layer in layers])
        return dict(zip(("w1", "w3", "w2"), (*gate_up.chunk(2, dim=2), down), strict=True))

    return run


def relative_errors(found: Tensor, expected: Tensor) -> Tensor:
    """``||found - expected|| / ||expected||`` of every row, in float64."""
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


@pytest.mark.parametrize("merge", TOLERANCE)
@pytest.mark.parametrize("matrix", ["w1", "w2", "w3"])
def test_the_merged_weights_are_the_same(
    merge_all: MergeAll, reference: dict[str, Tensor], merge: Merge, matrix: str
) -> None:
    merged = merge_all(merge, Features.ACTIVATION)[matrix].double()
    products = merged @ reference[f"probe.{merged.shape[-1]}"]
    expected = reference[f"merged.{merge}.4.{matrix}"]
    assert products.shape == expected.shape
    assert relative_errors(products, expected).max() < TOLERANCE[merge]


@pytest.mark.parametrize("merge", TOLERANCE)
def test_other_features_would_give_other_weights(
    merge_all: MergeAll, reference: dict[str, Tensor], merge: Merge
) -> None:
    # Otherwise the comparison above would prove nothing about activations.
    merged = merge_all(merge, Features.WEIGHT)["w1"].double()
    assert relative_errors(merged @ reference["probe.64"], reference[f"merged.{merge}.4.w1"]).max() > 0.01
