"""Groups of the published code of HC-SMoE and of scipy, from the distances of a small Mixtral's experts.

``tests/golden/README.md`` says where the figures come from. The Euclidean distances are stored in float32; the closest
decision between two merges is 0.3 % wide, so that this rounding decides none.
"""

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from places import GOLDEN
from safetensors.numpy import load_file

from hcsmoe_hub.methods.clustering import Clusters, coordinates, frequency_budget, hierarchical, kmeans, single_shot
from hcsmoe_hub.options import KMeansStart, Linkage

SIMILARITIES = ("expert-output", "weight", "router-logits")
COUNTS = (4, 2)
LAYERS = range(4)
EXPERTS = 8
# Groups that the reference makes of 8 experts: one more in all than 4 layers times K.
REFERENCE_COUNTS = {4: (5, 4, 4, 4), 2: (2, 2, 3, 2)}

Array = NDArray[np.float64]


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """Labels by method, and by similarity, linkage and K."""
    return json.loads((GOLDEN / "clusters.json").read_text())


@pytest.fixture(scope="module")
def tensors() -> dict[str, NDArray[Any]]:
    """Distances, similarities and usage, all layers at once."""
    return load_file(GOLDEN / "distances.safetensors")


def seeds(tensors: dict[str, NDArray[Any]], layer: int, count: int) -> list[int]:
    """The most used experts, in that order."""
    usage = tensors["usage"][layer].tolist()
    return sorted(range(EXPERTS), key=lambda expert: (-usage[expert], expert))[:count]


def cosine_distances(tensors: dict[str, NDArray[Any]], similarity: str, layer: int) -> Array:
    """From the reference's ``(cos + 1) / 2``."""
    cosine: Array = 2 * tensors[f"similarity.{similarity}"][layer].astype(np.float64) - 1
    return 1 - cosine


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("linkage", [linkage for linkage in Linkage if linkage is not Linkage.LOSS])
@pytest.mark.parametrize("count", COUNTS)
def test_hierarchical_groups_are_those_of_the_reference_or_of_scipy(
    golden: dict[str, Any], tensors: dict[str, NDArray[Any]], similarity: str, linkage: Linkage, count: int
) -> None:
    expected = golden["hierarchical"][f"{similarity}.{linkage}.{count}"]
    for layer in LAYERS:
        distances_EE = tensors[f"euclidean.{similarity}"][layer].astype(np.float64)
        assert hierarchical(distances_EE, count, linkage).clusters.labels == tuple(expected[layer])


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("count", COUNTS)
def test_k_means_from_the_first_experts_gives_the_groups_of_lloyds_algorithm(
    golden: dict[str, Any], tensors: dict[str, NDArray[Any]], similarity: str, count: int
) -> None:
    expected = golden["kmeans"][f"{similarity}.{count}"]
    for layer in LAYERS:
        points_ED = coordinates(tensors[f"euclidean.{similarity}"][layer].astype(np.float64))
        assert kmeans([points_ED], count, KMeansStart.FIRST, 0).tolist() == expected[layer]


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("count", COUNTS)
def test_single_shot_groups_around_the_most_used_experts_are_those_of_the_reference(
    golden: dict[str, Any], tensors: dict[str, NDArray[Any]], similarity: str, count: int
) -> None:
    expected = golden["single-shot"][f"{similarity}.{count}"]
    compared = [layer for layer in LAYERS if REFERENCE_COUNTS[count][layer] == count]
    assert len(compared) == 3
    for layer in compared:
        found = single_shot(cosine_distances(tensors, similarity, layer), seeds(tensors, layer, count))
        assert Clusters.of(found.tolist()) == Clusters.of(expected["labels"][layer])


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("count", COUNTS)
def test_single_shot_groups_are_those_of_the_reference_in_its_layer_with_one_group_too_many(
    golden: dict[str, Any], tensors: dict[str, NDArray[Any]], similarity: str, count: int
) -> None:
    expected = golden["single-shot"][f"{similarity}.{count}"]
    (layer,) = (layer for layer in LAYERS if REFERENCE_COUNTS[count][layer] > count)
    taken = expected["dominant"][layer]
    assert taken == seeds(tensors, layer, count + 1)
    found = single_shot(cosine_distances(tensors, similarity, layer), taken)
    # The reference numbers its groups like its seeds, by usage.
    assert found.tolist() == expected["labels"][layer]


@pytest.mark.parametrize("count", COUNTS)
def test_clusters_per_layer_are_those_of_the_reference_without_the_least_used_seed(
    golden: dict[str, Any], tensors: dict[str, NDArray[Any]], count: int
) -> None:
    usage = tensors["usage"].tolist()
    reference = golden["single-shot"][f"router-logits.{count}"]["dominant"]
    assert tuple(len(taken) for taken in reference) == REFERENCE_COUNTS[count]
    found = frequency_budget(usage, count, 1)
    assert sum(found) == count * len(LAYERS) == sum(REFERENCE_COUNTS[count]) - 1
    removable = [(usage[layer][expert], layer) for layer, taken in enumerate(reference) for expert in taken[1:]]
    _, extra = min(removable)
    assert found == tuple(len(taken) - (layer == extra) for layer, taken in enumerate(reference))
