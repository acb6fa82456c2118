"""Merges the experts of one layer, by any of the merges.

E source experts, C clusters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hcsmoe_hub.methods.clustering.clusters import Clusters
from hcsmoe_hub.methods.clustering.energies import NeuronEnergies
from hcsmoe_hub.methods.merging.alignment import align_neurons, alignment_features
from hcsmoe_hub.methods.merging.best_neurons import best_neurons, is_one_expert, write_neurons
from hcsmoe_hub.methods.merging.fix_dom import fix_dom_groups
from hcsmoe_hub.methods.merging.neuron_features import HiddenSample, correlation_features, correlations
from hcsmoe_hub.methods.merging.neuron_origins import NeuronOrigins, Part
from hcsmoe_hub.methods.merging.neurons import Neurons, NeuronView
from hcsmoe_hub.methods.merging.weighted import merge_rows
from hcsmoe_hub.methods.merging.zipit import zipit_groups
from hcsmoe_hub.options import Align, AlignTo, Merge
from hcsmoe_hub.recipe.recipe import Recipe

# The number of the expert that the M-SMoE paper aligns all others of a layer to.
FIRST_EXPERT = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Merged:
    """The merged experts of one layer.

    Attributes:
        tensors: ``[C, ...]`` by the names of the source's tensors, in their dtypes.
        unseen: Clusters whose neurons were to be matched by activations, but too few sampled tokens reach them; their
            neurons were matched by weights.
        origins: Where their neurons come from, if these were kept whole.
    """

    tensors: dict[str, Tensor]
    unseen: tuple[int, ...] = ()
    origins: NeuronOrigins | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MergeGroups:
    """Which experts are merged, and how much each counts.

    Attributes:
        clusters: A partition of the E experts.
        dominants: The dominant expert of every cluster.
        share_EC: Shares from ``member_shares``, ``[E, C]`` float64; equal ones for merges of neurons.
        shapes: Shape of one merged expert in every tensor, where it is made of the best neurons of its cluster; by
            default that of a source expert.
        origins: The neurons that each is made of, where that is given and neurons are kept whole.
    """

    clusters: Clusters
    dominants: Sequence[int]
    share_EC: Tensor
    shapes: Mapping[str, Sequence[int]] | None = None
    origins: NeuronOrigins | None = None

    def anchor(self, number: int, align_to: AlignTo | None) -> int:
        """The expert whose order of neurons the merged expert of a cluster has; one that is alone keeps its own."""
        is_alone = len(self.clusters.members[number]) == 1
        return FIRST_EXPERT if align_to is AlignTo.FIRST and not is_alone else self.dominants[number]

    def cluster(self, number: int, align_to: AlignTo | None = None) -> "_Cluster":
        """One of the clusters.

        Args:
            number: Its number.
            align_to: Whose order of neurons its members take.
        """
        members, anchor = self.clusters.members[number], self.anchor(number, align_to)
        experts = members if anchor in members else (*members, anchor)
        share_M1 = self.share_EC[list(members), number, None]
        return _Cluster(experts=experts, anchor=experts.index(anchor), share_M1=share_M1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Cluster:
    """M experts that become one.

    Attributes:
        experts: Their numbers; after them that of the expert whose order of neurons they take, if it is not a member.
        anchor: The place of this expert in ``experts``.
        share_M1: Shares of the members, ``[M, 1]`` float64.
    """

    experts: tuple[int, ...]
    anchor: int
    share_M1: Tensor

    @property
    def size(self) -> int:
        """M, the number of members."""
        return len(self.share_M1)


def merge_experts(
    rows: Mapping[str, Tensor],
    view: NeuronView,
    *,
    groups: MergeGroups,
    recipe: Recipe,
    sample: HiddenSample | None = None,
    energies: NeuronEnergies | None = None,
) -> Merged:
    """Merges the experts of one layer as a recipe says.

    Weighted merges sum whole experts, after the neurons of every member have been put in the order of the dominant
    one, or of the first expert of the layer, where the recipe aligns. Fix-Dom and ZipIt average groups of neurons, and
    average plainly what belongs to no neuron. ``neurons`` takes the best neurons of all members as they are, but for a
    scale of what they add to the output, and averages by usage what belongs to no neuron. Everything is summed in
    float32 or wider and rounded once; an expert that is alone in its cluster keeps its bits. Only the members of one
    cluster are copied at a time, and the expert that they are aligned to.

    Args:
        rows: Tensors of the experts by name, ``[E, ...]``; not changed.
        view: Looks at such tensors neuron by neuron, whatever the number of experts; see ``Experts.neurons``.
        groups: Which experts are merged.
        recipe: Its merge, its features and its alignment are used; without a merge (pruning) shares alone count.
        sample: Source of hidden activations, where features or alignment need them.
        energies: Which neurons are the best, where they are kept whole.

    Returns:
        The merged experts.
    """
    if recipe.merge is Merge.NEURONS:
        assert energies is not None, "a recipe that keeps the best neurons asks for their energies"
        return _best_of(rows, view, groups, energies)
    merges_neurons = recipe.merge in (Merge.FIX_DOM, Merge.FIX_DOM_ONE_TO_ONE, Merge.ZIPIT)
    if not merges_neurons and recipe.align in (Align.NONE, None):
        return Merged(tensors={name: merge_rows(rows_E, groups.share_EC) for name, rows_E in rows.items()})
    merged = {name: rows_E.new_empty((len(groups.dominants), *rows_E.shape[1:])) for name, rows_E in rows.items()}
    unseen = []
    for number in range(len(groups.dominants)):
        cluster = groups.cluster(number, recipe.align_to)
        # Indices would be copied to an accelerator, which is waited for.
        copies = {name: torch.stack([rows_E[expert] for expert in cluster.experts]) for name, rows_E in rows.items()}
        target = {name: tensor[number, None] for name, tensor in merged.items()}
        if cluster.size == 1:
            _copy(copies, target)
        elif not _merge_cluster(copies, target, cluster, view=view, recipe=recipe, sample=sample):
            unseen.append(number)
    return Merged(tensors=merged, unseen=tuple(unseen))


def _best_of(rows: Mapping[str, Tensor], view: NeuronView, groups: MergeGroups, energies: NeuronEnergies) -> Merged:
    """Experts made of the best neurons of each cluster; of copies of one expert, the dominant one as it is."""
    count, shapes = len(groups.dominants), groups.shapes or {name: rows_E.shape[1:] for name, rows_E in rows.items()}
    merged = {name: rows_E.new_empty((count, *shapes[name])) for name, rows_E in rows.items()}
    is_narrower, chosen = energies.width < energies.own_UI.shape[1], list[list[Part]]()
    for number, members in enumerate(groups.clusters.members):
        target = {name: tensor[number, None] for name, tensor in merged.items()}
        expert = view(target)
        if is_one_expert(energies, members) and not is_narrower:
            _copy({name: rows_E[groups.dominants[number], None] for name, rows_E in rows.items()}, target)
            chosen.append([(groups.dominants[number], torch.arange(expert.size), torch.ones(expert.size))])
            continue
        found = groups.origins
        parts = best_neurons(energies, members) if found is None else found.parts(number, energies, members)
        chosen.append(list(parts))
        write_neurons(rows, view, chosen[-1], target=expert)
        share_M1 = groups.cluster(number).share_M1
        for place, rows_E in zip(expert.others, view(rows).others, strict=True):
            place.copy_(merge_rows(torch.stack([rows_E[member] for member in members]), share_M1))
    return Merged(tensors=merged, origins=NeuronOrigins.of(chosen))


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Writes tensors over those of the same names."""
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _merge_cluster(
    copies: dict[str, Tensor],
    target: dict[str, Tensor],
    cluster: _Cluster,
    *,
    view: NeuronView,
    recipe: Recipe,
    sample: HiddenSample | None,
) -> bool:
    """Merges one cluster: copies of its experts, which may be changed, into tensors ``[1, ...]``.

    Returns:
        Whether neurons were matched by the features that the recipe names.
    """
    neurons, experts = view(copies), cluster.experts
    match recipe.merge:
        case Merge.FIX_DOM | Merge.FIX_DOM_ONE_TO_ONE | Merge.ZIPIT:
            assert recipe.features is not None
            describe, is_seen = correlation_features(neurons, experts, recipe.features, sample)
        case Merge.FREQUENCY | Merge.AVERAGE | Merge.SALIENCY | Merge.DOMINANT | Merge.MEMBERSHIP | None:
            assert recipe.align is not None
            describe, is_seen = alignment_features(neurons, experts, recipe.align, sample)
    match recipe.merge:
        case Merge.FIX_DOM:
            group_N = fix_dom_groups(describe, cluster.size, cluster.anchor)
            _write_means(neurons, group_N, cluster.share_M1, view(target))
        case Merge.ZIPIT:
            group_N = zipit_groups(correlations(describe, cluster.size), neurons.size)
            _write_means(neurons, group_N, cluster.share_M1, view(target))
        case (
            Merge.FIX_DOM_ONE_TO_ONE
            | Merge.FREQUENCY
            | Merge.AVERAGE
            | Merge.SALIENCY
            | Merge.DOMINANT
            | Merge.MEMBERSHIP
            | None
        ):
            align_neurons(neurons, describe, cluster.anchor)
            members = {name: rows[: cluster.size] for name, rows in copies.items()}
            _copy({name: merge_rows(rows_M, cluster.share_M1) for name, rows_M in members.items()}, target)
    return is_seen


def _write_means(neurons: Neurons, group_N: Tensor, share_M1: Tensor, target: Neurons) -> None:
    """Averages groups of neurons, and whole experts where no neuron is concerned, into one expert."""
    inputs, outputs = neurons.average(group_N.to(neurons.outputs[0].device))
    for place, mean_I in zip((*target.inputs, *target.outputs), (*inputs, *outputs), strict=True):
        place[0] = mean_I
    for place, rows_M in zip(target.others, neurons.others, strict=True):
        place.copy_(merge_rows(rows_M, share_M1))
