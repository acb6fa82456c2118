"""Groups of experts, independent of the method that found them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DROPPED = -1


@dataclass(frozen=True, slots=True)
class Clusters:
    """Which experts belong together.

    Attributes:
        labels: Cluster of every expert; the first expert is in cluster 0, the next new cluster is 1. ``DROPPED`` marks
            an expert that pruning leaves out.
        heights: Linkage distance of every merge, in the order they were made, or the share of the layer's output energy
            that it lost; empty if the method has none.
    """

    labels: tuple[int, ...]
    heights: tuple[float, ...] = ()

    @classmethod
    def of(cls, labels: Sequence[int], heights: Sequence[float] = ()) -> "Clusters":
        """Renumbers arbitrary labels by first appearance; ``DROPPED`` stays."""
        numbers: dict[int, int] = {DROPPED: DROPPED}
        canonical = tuple(numbers.setdefault(int(label), len(numbers) - 1) for label in labels)
        return cls(labels=canonical, heights=tuple(float(height) for height in heights))

    @property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """Experts of every cluster, ascending."""
        members: list[list[int]] = [[] for _ in range(len(set(self.labels) - {DROPPED}))]
        for expert, label in enumerate(self.labels):
            if label != DROPPED:
                members[label].append(expert)
        return tuple(tuple(cluster) for cluster in members)

    def dominant(self, score_E: Sequence[float]) -> tuple[int, ...]:
        """The expert with the highest score of every cluster; the lowest number among equals."""
        return tuple(max(cluster, key=lambda expert: (score_E[expert], -expert)) for cluster in self.members)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grouping:
    """What a clustering found.

    Attributes:
        clusters: The partition; of a fuzzy clustering, the cluster of every expert's greatest membership.
        membership_EC: Memberships ``[E, C]`` float64 of a fuzzy clustering, rows summing to 1; otherwise ``None``.
        tree: The full linkage matrix ``[E - 1, 4]`` of a hierarchical clustering, as scipy defines it; ``None`` where
            the method has none or protected experts stand outside of it.
    """

    clusters: Clusters
    membership_EC: NDArray[np.float64] | None = None
    tree: NDArray[Any] | None = None
