"""Groups one layer's experts into K clusters, by the method that a recipe names."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.methods.clustering.capacity import limit_sizes, lowest_of_least, medoids
from hcsmoe_hub.methods.clustering.clusters import Clusters, Grouping
from hcsmoe_hub.methods.clustering.distances import normalised
from hcsmoe_hub.methods.clustering.embedding import coordinates
from hcsmoe_hub.methods.clustering.energies import NeuronEnergies
from hcsmoe_hub.methods.clustering.fuzzy import fuzzy_memberships, hard_labels
from hcsmoe_hub.methods.clustering.hierarchical import hierarchical
from hcsmoe_hub.methods.clustering.kmeans import kmeans
from hcsmoe_hub.methods.clustering.loss import loss_linkage
from hcsmoe_hub.methods.clustering.random_groups import random_groups
from hcsmoe_hub.methods.clustering.single_shot import single_shot
from hcsmoe_hub.options import Clustering, Dominant, Linkage
from hcsmoe_hub.recipe.recipe import Recipe


def group_experts(
    distances: Sequence[NDArray[np.float64]],
    count: int,
    recipe: Recipe,
    *,
    score_E: Sequence[float],
    protected: frozenset[int] = frozenset(),
    energies: NeuronEnergies | None = None,
) -> Grouping:
    """Groups the experts of one layer into exactly ``count`` clusters.

    The distances of several similarities are normalised and added; k-means adds the distances to the centre of every
    similarity instead. Protected experts stay alone, the others share the remaining clusters. As many clusters as
    experts leave every expert alone, whatever the method.

    Args:
        distances: Symmetric ``[E, E]`` float64 distances with a zero diagonal, one matrix per similarity, as measured;
            random groups without a size limit need none.
        count: K, the number of clusters, between 1 and E.
        recipe: Method, linkage, start of k-means, size limit and seed; fuzzy clustering has no size limit.
        score_E: Importance of every expert, in any unit; single-shot grouping takes the highest as seeds.
        protected: Experts that no other may join.
        energies: Of the experts' neurons, for the loss linkage.

    Returns:
        The clusters, numbered by first appearance; memberships if they are fuzzy, their columns in that order; the
        tree if it is hierarchical and covers all experts. Where the size limit moved experts, the partition
        is not a cut of the tree any more and has no heights.

    Raises:
        PlanError: If there are fewer clusters than the protected and the other experts need, or too few for the size
            limit.
    """
    experts = len(score_E)
    if not 1 <= count <= experts:
        raise PlanError(
            f"{experts} experts cannot form {count} clusters.", hint=f"ask for 1 to {experts} experts in this layer"
        )
    # Where every expert stays alone, protection changes nothing.
    apart = protected if count < experts else frozenset()
    rest = [expert for expert in range(experts) if expert not in apart]
    left = count - len(apart)
    if left < 1:
        raise PlanError(
            f"{len(apart)} of {experts} experts are protected: {count} clusters leave none for the others.",
            hint="protect fewer experts, or keep more",
        )
    scaled = distances if len(distances) == 1 else [normalised(matrix_EE) for matrix_EE in distances]
    among_rest = [matrix_EE[np.ix_(rest, rest)] for matrix_EE in scaled]
    rest_energies = energies.part(rest) if apart and energies is not None else energies
    found = _group(among_rest, left, recipe, [score_E[expert] for expert in rest], rest_energies)
    return _with_protected(found, rest, experts) if apart else found


def _group(
    distances: Sequence[NDArray[np.float64]],
    count: int,
    recipe: Recipe,
    score_E: Sequence[float],
    energies: NeuronEnergies | None,
) -> Grouping:
    """Groups experts, none of them protected, by distances that can be added."""
    experts = len(score_E)
    summed_EE = np.sum(distances, axis=0)
    anchors: Sequence[int] | None = None
    match recipe.clustering:
        case Clustering.HIERARCHICAL if recipe.linkage is Linkage.LOSS:
            assert energies is not None, "the loss linkage is a function of energies"
            found = loss_linkage(energies, count)
        case Clustering.HIERARCHICAL:
            assert recipe.linkage is not None
            found = hierarchical(summed_EE, count, recipe.linkage)
        case Clustering.FUZZY:
            return _fuzzy(summed_EE, count, recipe.seed)
        case Clustering.KMEANS:
            assert recipe.kmeans_start is not None
            points = [coordinates(matrix_EE) for matrix_EE in distances]
            found = Grouping(clusters=Clusters.of(kmeans(points, count, recipe.kmeans_start, recipe.seed).tolist()))
        case Clustering.SINGLE_SHOT:
            anchors = sorted(range(experts), key=lambda expert: (-score_E[expert], expert))[:count]
            found = Grouping(clusters=Clusters.of(single_shot(summed_EE, anchors).tolist()))
        case Clustering.RANDOM:
            found = Grouping(clusters=Clusters.of(random_groups(experts, count, recipe.seed).tolist()))
        case None:
            raise ValueError("the recipe clusters no experts")
    if recipe.max_cluster_size is None:
        return found
    labels = np.array(found.clusters.labels)
    # Anchors in the order of the labels, which are numbered by first appearance.
    placed = medoids(summed_EE, labels) if anchors is None else sorted(anchors, key=lambda expert: labels[expert])
    limited = Clusters.of(limit_sizes(summed_EE, labels, placed, recipe.max_cluster_size).tolist())
    return found if limited.labels == found.clusters.labels else replace(found, clusters=limited)


def _fuzzy(distances_EE: NDArray[np.float64], count: int, seed: int) -> Grouping:
    """Fuzzy clusters, their columns in the order of the labels."""
    experts = len(distances_EE)
    if count == experts:
        return Grouping(clusters=Clusters.of(range(experts)), membership_EC=np.eye(experts))
    membership_EC = fuzzy_memberships(coordinates(distances_EE), count, seed)
    labels = hard_labels(membership_EC).tolist()
    return Grouping(clusters=Clusters.of(labels), membership_EC=membership_EC[:, list(dict.fromkeys(labels))])


def _with_protected(found: Grouping, rest: Sequence[int], experts: int) -> Grouping:
    """Puts protected experts, each alone, next to the groups of the others."""
    # Numbers of protected experts begin where those of the groups end.
    labels = list(range(experts, 2 * experts))
    for expert, label in zip(rest, found.clusters.labels, strict=True):
        labels[expert] = label
    clusters = Clusters.of(labels, found.clusters.heights)
    if found.membership_EC is None:
        return Grouping(clusters=clusters)
    membership_EC = np.zeros((experts, len(clusters.members)))
    for column, label in enumerate(dict.fromkeys(labels)):
        if label < experts:
            membership_EC[rest, column] = found.membership_EC[:, label]
        else:
            membership_EC[label - experts, column] = 1.0
    return Grouping(clusters=clusters, membership_EC=membership_EC)


def dominant_experts(
    clusters: Clusters, distances_EE: NDArray[np.float64], dominant: Dominant, *, score_E: Sequence[float]
) -> tuple[int, ...]:
    """The dominant expert of every cluster.

    ``center`` is the member nearest to the cluster mean c (HC-SMoE's code). For Euclidean distances
    ``||e_i - c||^2 = mean_j d(i, j)^2 - mean_jk d(j, k)^2 / 2`` over the members j and k, so it is the member with the
    least mean squared distance to all members, which is what other distances use as well.

    Args:
        clusters: The groups.
        distances_EE: Distances of all experts; of several similarities, those of ``joined_distances``.
        dominant: The rule.
        score_E: What every other rule ranks by: usage, routing score or saliency.

    Returns:
        One expert per cluster, the lowest number among equals.
    """
    match dominant:
        case Dominant.CENTER:
            return tuple(
                members[lowest_of_least(np.square(distances_EE[np.ix_(members, members)]).mean(axis=1))]
                for members in clusters.members
            )
        case Dominant.FREQUENCY | Dominant.ROUTING_SCORE | Dominant.SALIENCY:
            return clusters.dominant(score_E)
