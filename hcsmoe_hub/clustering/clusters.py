"""A partition of one layer's experts, with labels numbered by first appearance."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clusters:
    """Which cluster every expert belongs to.

    Attributes:
        labels: One cluster number per source expert; the first expert is in cluster 0, the next new cluster is 1.
        heights: Linkage distance of every merge, in the order they were made; empty if the method has none.
    """

    labels: tuple[int, ...]
    heights: tuple[float, ...] = ()

    @classmethod
    def of(cls, labels: Sequence[int], heights: Sequence[float] = ()) -> "Clusters":
        """Renumbers arbitrary labels by first appearance."""
        numbers: dict[int, int] = {}
        canonical = tuple(numbers.setdefault(int(label), len(numbers)) for label in labels)
        return cls(labels=canonical, heights=tuple(float(height) for height in heights))

    @property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """Experts of every cluster, ascending."""
        members: list[list[int]] = [[] for _ in range(len(set(self.labels)))]
        for expert, label in enumerate(self.labels):
            members[label].append(expert)
        return tuple(tuple(cluster) for cluster in members)

    def dominant(self, usage: Sequence[float]) -> tuple[int, ...]:
        """The most used expert of every cluster; the lowest number among equals."""
        return tuple(max(cluster, key=lambda expert: (usage[expert], -expert)) for cluster in self.members)
