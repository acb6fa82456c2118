"""Agglomerative clustering: the closest two clusters become one until K are left."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from hcsmoe_hub.methods.clustering.clusters import Clusters, Grouping
from hcsmoe_hub.options import Linkage

# Linkages of distances by scipy's names.
_SCIPY: Mapping[Linkage, Literal["average", "single", "complete", "ward"]] = {
    Linkage.AVERAGE: "average",
    Linkage.SINGLE: "single",
    Linkage.COMPLETE: "complete",
    Linkage.WARD: "ward",
}


def hierarchical(distances_EE: NDArray[np.float64], clusters: int, method: Linkage) -> Grouping:
    """Groups experts by hierarchical clustering (HC-SMoE, algorithm 1).

    The linkage of two clusters A and B over the distances d of their members (eq. 6 to 8): single ``min d``, complete
    ``max d``, average ``1/(|A||B|) sum d``; ward is the increase of the squared error, defined for Euclidean distances.

    Args:
        distances_EE: Symmetric ``[E, E]`` distances with a zero diagonal.
        clusters: K, between 1 and E.
        method: The linkage.

    Returns:
        Exactly K clusters with the E - K linkage distances at which they were merged, and the tree of all E - 1 merges.

    Raises:
        ValueError: If the linkage is not one of distances.
    """
    if method not in _SCIPY:
        raise ValueError(f"{method} linkage is not a function of distances")
    experts = len(distances_EE)
    # scipy refuses a matrix without any pair.
    condensed = squareform(distances_EE, checks=False)
    tree: NDArray[np.float64] = linkage(condensed, method=_SCIPY[method]) if experts > 1 else np.empty((0, 4))
    return cut_tree(tree, clusters)


def cut_tree(tree: NDArray[np.float64], clusters: int) -> Grouping:
    """The clusters that are left after the first merges of a tree.

    Args:
        tree: Linkage matrix ``[E - 1, 4]`` as scipy defines it.
        clusters: K, between 1 and E.

    Returns:
        Exactly K clusters with the heights of the E - K merges that made them, and the tree.
    """
    experts = len(tree) + 1
    merges = tree[: experts - clusters]
    members = {expert: [expert] for expert in range(experts)}
    # Row n of the tree unites two clusters into number E + n. Taking the rows in order gives exactly K clusters even
    # where distances are equal, which a cut at a height cannot.
    for number, (left, right) in enumerate(merges[:, :2].astype(int)):
        members[experts + number] = members.pop(int(left)) + members.pop(int(right))
    labels = [0] * experts
    for number, cluster in members.items():
        for expert in cluster:
            labels[expert] = number
    return Grouping(clusters=Clusters.of(labels, merges[:, 2].tolist()), tree=tree)
