"""Which experts meet: features to distances, distances to clusters; pure functions of tensors."""

from hcsmoe_hub.clustering.clusters import Clusters
from hcsmoe_hub.clustering.distances import pairwise_distances
from hcsmoe_hub.clustering.hierarchical import hierarchical

__all__ = ["Clusters", "hierarchical", "pairwise_distances"]
