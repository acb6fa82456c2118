"""What a figure shows of one MoE layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcsmoe_hub.methods.clustering.clusters import DROPPED


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerPicture:
    """What the figure shows of one MoE layer.

    Attributes:
        layer: Index of the decoder layer.
        usage: ``[E]``, how many tokens the router sent to each source expert.
        labels: ``[E]``, cluster of each source expert; -1 for an expert that was pruned.
        distances_EE: Distances ``[E, E]`` between the experts; ``None`` for random groups and for pruning.
        tree: The linkage matrix ``[E - 1, 4]`` as scipy defines it; ``None`` where the method has none.
        is_loss: Whether distances and heights are shares of the layer's output energy that merges lose.
    """

    layer: int
    usage: Sequence[int]
    labels: Sequence[int]
    distances_EE: NDArray[Any] | None
    tree: NDArray[Any] | None
    is_loss: bool = False

    def __post_init__(self) -> None:
        experts = len(self.labels)
        arrays = [(self.usage, (experts,)), (self.distances_EE, (experts, experts)), (self.tree, (experts - 1, 4))]
        wrong = [np.shape(array) for array, shape in arrays if array is not None and np.shape(array) != shape]
        if wrong or not experts:
            raise ValueError(f"Layer {self.layer} has {experts} labels, but arrays of the shapes {wrong}.")

    @property
    def dendrogram(self) -> NDArray[Any] | None:
        """The tree, unless it is of a single expert."""
        return self.tree if len(self.labels) > 1 else None

    @property
    def is_merged(self) -> bool:
        """Whether any experts share a cluster."""
        kept = [label for label in self.labels if label != DROPPED]
        return len(set(kept)) < len(kept)

    @property
    def summary(self) -> str:
        """How many experts the layer had and has left."""
        return f"{len(self.labels)} → {len(set(self.labels) - {DROPPED})}"
