"""Groups experts into clusters: features to distances, distances to clusters; pure functions of tensors."""

from hcsmoe_hub.methods.clustering.budget import frequency_budget
from hcsmoe_hub.methods.clustering.capacity import limit_sizes, medoids
from hcsmoe_hub.methods.clustering.clusters import DROPPED, Clusters, Grouping
from hcsmoe_hub.methods.clustering.distances import gram_distances, joined_distances, normalised, pairwise_distances
from hcsmoe_hub.methods.clustering.embedding import coordinates
from hcsmoe_hub.methods.clustering.energies import NeuronEnergies
from hcsmoe_hub.methods.clustering.fuzzy import fuzzy_memberships, hard_labels
from hcsmoe_hub.methods.clustering.gram import row_distances
from hcsmoe_hub.methods.clustering.grouping import dominant_experts, group_experts
from hcsmoe_hub.methods.clustering.hierarchical import cut_tree, hierarchical
from hcsmoe_hub.methods.clustering.kmeans import kmeans
from hcsmoe_hub.methods.clustering.loss import loss_linkage, pair_losses
from hcsmoe_hub.methods.clustering.overlap import overlap_distances
from hcsmoe_hub.methods.clustering.prediction import LossTable, loss_table
from hcsmoe_hub.methods.clustering.quality import dunn, silhouette
from hcsmoe_hub.methods.clustering.random_groups import random_groups
from hcsmoe_hub.methods.clustering.single_shot import single_shot

__all__ = [
    "DROPPED",
    "Clusters",
    "Grouping",
    "LossTable",
    "NeuronEnergies",
    "coordinates",
    "cut_tree",
    "dominant_experts",
    "dunn",
    "frequency_budget",
    "fuzzy_memberships",
    "gram_distances",
    "group_experts",
    "hard_labels",
    "hierarchical",
    "joined_distances",
    "kmeans",
    "limit_sizes",
    "loss_linkage",
    "loss_table",
    "medoids",
    "normalised",
    "overlap_distances",
    "pair_losses",
    "pairwise_distances",
    "random_groups",
    "row_distances",
    "silhouette",
    "single_shot",
]
