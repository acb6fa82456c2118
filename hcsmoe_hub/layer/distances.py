"""The distances between the experts of one layer, for every similarity that a recipe can name.

E experts, T tokens, H hidden size.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hcsmoe_hub.methods.clustering import gram_distances, overlap_distances, pairwise_distances, row_distances
from hcsmoe_hub.model.experts import Experts
from hcsmoe_hub.observation.sample import NeuronSample
from hcsmoe_hub.observation.statistics import LayerStatistics
from hcsmoe_hub.options import Similarity
from hcsmoe_hub.recipe.recipe import OVERLAPS, Recipe

# Tokens per chunk of all experts' outputs: small, as there are E of them at once.
CHUNK_TOKENS = 128


def expert_distances(
    recipe: Recipe,
    statistics: LayerStatistics,
    *,
    expert_rows: Sequence[Tensor],
    router_rows: Sequence[Tensor],
    sample: NeuronSample | None,
) -> list[NDArray[np.float64]]:
    """Distances ``[E, E]`` for each similarity of a recipe, in its order; none where experts are not compared.

    Args:
        recipe: Names the similarities and the distance.
        statistics: Of the layer.
        expert_rows: Weights of the experts, ``[E, ...]`` each.
        router_rows: Weights of the router, ``[E, ...]`` each.
        sample: Tokens for the distances that compare outputs token by token.
    """
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
                found.append(pairwise_distances(statistics.outputs_EH, distance))
            case Similarity.WEIGHT:
                found.append(row_distances(expert_rows, distance))
            case Similarity.ROUTER_LOGITS:
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
