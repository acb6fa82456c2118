"""The distances between the experts of one layer, for every similarity that a recipe can name.

E experts, T tokens, H hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hcsmoe_hub.methods.clustering import (
    NeuronEnergies,
    gram_distances,
    overlap_distances,
    pair_losses,
    pairwise_distances,
    row_distances,
)
from hcsmoe_hub.model.experts import Experts
from hcsmoe_hub.observation.sample import NeuronSample
from hcsmoe_hub.observation.statistics import LayerStatistics
from hcsmoe_hub.options import Linkage, Similarity
from hcsmoe_hub.recipe.recipe import OVERLAPS, Recipe

# Tokens per chunk of all experts' outputs: small, as there are E of them at once.
CHUNK_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """What the experts of one layer are grouped by.

    Attributes:
        distances: Symmetric ``[E, E]`` matrices: one for each similarity of a recipe, in its order; what uniting two
            experts would lose, for the loss linkage; none where experts are not compared.
        energies: Of their neurons, where a recipe needs them.
    """

    distances: list[NDArray[np.float64]]
    energies: NeuronEnergies | None = None


def compare_experts(
    recipe: Recipe,
    statistics: LayerStatistics,
    *,
    expert_rows: Sequence[Tensor],
    router_rows: Sequence[Tensor],
    sample: NeuronSample | None,
    energies: NeuronEnergies | None = None,
) -> Comparison:
    """Compares the experts of one layer as a recipe says.

    Args:
        recipe: Names the similarities and the distance.
        statistics: Of the layer.
        expert_rows: Weights of the experts, ``[E, ...]`` each.
        router_rows: Weights of the router, ``[E, ...]`` each.
        sample: Tokens for the distances that compare outputs token by token.
        energies: Of their neurons, for the loss linkage.
    """
    if recipe.linkage is Linkage.LOSS:
        assert energies is not None, "a recipe with the loss linkage asks for the energies of neurons"
        return Comparison(distances=[pair_losses(energies)], energies=energies)
    distances = _distances(recipe, statistics, expert_rows, router_rows, sample)
    return Comparison(distances=distances, energies=energies)


def _distances(
    recipe: Recipe,
    statistics: LayerStatistics,
    expert_rows: Sequence[Tensor],
    router_rows: Sequence[Tensor],
    sample: NeuronSample | None,
) -> list[NDArray[np.float64]]:
    """Distances ``[E, E]`` for each similarity of a recipe."""
    distance = recipe.distance
    if recipe.similarity is None or distance is None:
        return []
    if distance in OVERLAPS:
        assert sample is not None, "a recipe that compares outputs token by token asks for a sample"
        return [overlap_distances(_all_outputs(sample), distance)]
    found = []
    for similarity in recipe.similarity:
        match similarity:
            case Similarity.EXPERT_OUTPUT:
                assert statistics.outputs_EH is not None, "a recipe that compares mean outputs asks for them"
                found.append(pairwise_distances(statistics.outputs_EH, distance))
            case Similarity.WEIGHT:
                found.append(row_distances(expert_rows, distance))
            case Similarity.ROUTER_LOGITS:
                assert statistics.logits_gram_EE is not None, "a recipe that compares router logits asks for them"
                found.append(gram_distances(statistics.logits_gram_EE.numpy(), distance))
            case Similarity.ROUTER_WEIGHT:
                found.append(row_distances(router_rows, distance))
    return found


def _all_outputs(sample: NeuronSample) -> Iterator[Tensor]:
    """Raw outputs of all experts on all tokens of a sample, ``[E, T, H]`` chunk by chunk."""
    for tokens_TH in sample.tokens_TH.split(CHUNK_TOKENS):
        yield outputs_of(sample.experts, tokens_TH)


def outputs_of(experts: Experts, tokens_TH: Tensor) -> Tensor:
    """Output of every expert on every token, routed there or not: ``[E, T, H]``."""
    with torch.no_grad():
        return torch.stack(
            [
                experts.project(expert, experts.hidden(expert, tokens_TH)).to(tokens_TH.dtype)
                for expert in range(experts.num_experts)
            ]
        )
