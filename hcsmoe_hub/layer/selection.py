"""Which experts of a layer are merged or kept: the recipe's clustering or pruning, on the layer's statistics."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hcsmoe_hub.layer.distances import Comparison
from hcsmoe_hub.methods.clustering import (
    Clusters,
    Grouping,
    dominant_experts,
    dunn,
    group_experts,
    joined_distances,
    silhouette,
)
from hcsmoe_hub.methods.pruning import (
    DroppedEnergy,
    ScaledResidual,
    best_subset,
    keep_best,
    keep_only,
    least_loss,
)
from hcsmoe_hub.methods.pruning.subsets import Subset
from hcsmoe_hub.observation.statistics import LayerStatistics
from hcsmoe_hub.options import Dominant, Method, Saliency
from hcsmoe_hub.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selection:
    """Which experts of one layer are merged or kept.

    Attributes:
        grouping: Clusters of merged experts; of pruning, every kept expert alone and the others dropped.
        dominants: The dominant expert of every cluster.
        distances_EE: What the clusters were found by, ``[E, E]``; ``None`` where experts are not compared.
    """

    grouping: Grouping
    dominants: tuple[int, ...]
    distances_EE: NDArray[np.float64] | None

    @property
    def clusters(self) -> Clusters:
        """The partition."""
        return self.grouping.clusters

    @property
    def keeps_all(self) -> bool:
        """Whether every expert is still there, alone."""
        return len(self.clusters.members) == len(self.clusters.labels)

    def silhouette(self) -> float | None:
        """Mean silhouette of the clusters; ``None`` where it is not defined."""
        return None if self.distances_EE is None else silhouette(self.distances_EE, self.clusters.labels)

    def dunn(self) -> float | None:
        """Dunn index of the clusters; ``None`` where it is not defined."""
        return None if self.distances_EE is None else dunn(self.distances_EE, self.clusters.labels)


def select(
    recipe: Recipe,
    statistics: LayerStatistics,
    compared: Comparison,
    count: int,
    *,
    protected: frozenset[int],
    subset_error: Callable[[], Callable[[Subset], float]],
) -> Selection:
    """Decides which experts are merged or kept.

    Args:
        recipe: Names the method.
        statistics: Of the layer.
        compared: How its experts differ.
        count: K.
        protected: Experts that are never merged or dropped.
        subset_error: Makes the function that gives the reconstruction error of a subset; called only if it is needed.
    """
    if recipe.method is Method.PRUNE:
        clusters = _prune(recipe, statistics, count, protected, subset_error)
        kept = tuple(members[0] for members in clusters.members)
        return Selection(grouping=Grouping(clusters=clusters), dominants=kept, distances_EE=None)
    grouping = group_experts(
        compared.distances,
        count,
        recipe,
        score_E=_dominant_scores(recipe, statistics),
        protected=protected,
        energies=compared.energies,
    )
    return select_groups(recipe, statistics, compared, grouping)


def select_groups(recipe: Recipe, statistics: LayerStatistics, compared: Comparison, grouping: Grouping) -> Selection:
    """Finds the dominant experts of clusters that are known.

    Args:
        recipe: Names the rule.
        statistics: Of the layer.
        compared: How its experts differ.
        grouping: The clusters.
    """
    joined_EE = joined_distances(compared.distances) if compared.distances else None
    nothing = np.zeros((0, 0))
    dominants = dominant_experts(
        grouping.clusters,
        nothing if joined_EE is None else joined_EE,
        _dominant_rule(recipe),
        score_E=_dominant_scores(recipe, statistics),
    )
    return Selection(grouping=grouping, dominants=dominants, distances_EE=joined_EE)


def given_selection(labels: Sequence[int], dominants: Sequence[int]) -> Selection:
    """What another conversion has decided; nothing is compared.

    Args:
        labels: Cluster of every expert.
        dominants: The dominant expert of every cluster.
    """
    grouping = Grouping(clusters=Clusters(labels=tuple(labels)))
    return Selection(grouping=grouping, dominants=tuple(dominants), distances_EE=None)


def _dominant_rule(recipe: Recipe) -> Dominant:
    # Where nothing follows a dominant expert, the report still names one.
    return recipe.dominant or Dominant.FREQUENCY


def _dominant_scores(recipe: Recipe, statistics: LayerStatistics) -> list[float]:
    return _scores(_dominant_rule(recipe), statistics)


def _scores(dominant: Dominant, statistics: LayerStatistics) -> list[float]:
    """What experts are ranked by, ``[E]``."""
    match dominant:
        case Dominant.FREQUENCY | Dominant.CENTER:
            scores: list[float] = statistics.usage_E.tolist()
        case Dominant.ROUTING_SCORE:
            scores = statistics.routing_score_E.tolist()
        case Dominant.SALIENCY:
            scores = statistics.saliency_E.tolist()
    return scores


def _found(values: Tensor | None) -> Tensor:
    assert values is not None, "the plan refuses statistics without what a recipe needs"
    return values


def _prune(
    recipe: Recipe,
    statistics: LayerStatistics,
    count: int,
    protected: frozenset[int],
    subset_error: Callable[[], Callable[[Subset], float]],
) -> Clusters:
    experts = len(statistics.usage_E)
    match recipe.saliency:
        case Saliency.FREQUENCY:
            return keep_best(statistics.usage_E.tolist(), count, protected)
        case Saliency.ROUTING_SCORE:
            return keep_best(statistics.routing_score_E.tolist(), count, protected)
        case Saliency.REAP:
            return keep_best(statistics.saliency_E.tolist(), count, protected)
        case Saliency.MAN:
            return keep_best(_found(statistics.norm_E).tolist(), count, protected)
        case Saliency.TOTAL_MASS:
            return keep_best(_found(statistics.mass_E).tolist(), count, protected)
        case Saliency.GRAM:
            energy = DroppedEnergy(_found(statistics.gram_EE).numpy())
            return keep_only(least_loss(energy, count, protected), experts)
        case Saliency.OMP:
            residual = ScaledResidual(_found(statistics.gram_EE).numpy())
            return keep_only(least_loss(residual, count, protected), experts)
        case Saliency.RECONSTRUCTION:
            return keep_only(best_subset(subset_error(), experts, count, seed=recipe.seed), experts)
        case None:
            raise ValueError("the recipe prunes no experts")
