"""Agglomerative clustering: the closest two clusters become one until K are left."""

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from hcsmoe_hub.methods.clustering.clusters import Clusters, Grouping
from hcsmoe_hub.options import Linkage


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
    """
    experts = len(distances_EE)
    # scipy refuses a matrix without any pair.
    condensed = squareform(distances_EE, checks=False)
    tree: NDArray[np.float64] = linkage(condensed, method=method.value) if experts > 1 else np.empty((0, 4))
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
