"""The loss linkage: every merge is the one that loses least, and loses what a computation by hand says."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from hcsmoe_hub.methods.clustering import Clusters, NeuronEnergies, group_experts, loss_linkage, pair_losses
from hcsmoe_hub.options import Dominant, Linkage, MethodOptions
from hcsmoe_hub.recipe.resolve import resolve

EXPERTS, NEURONS = 9, 7
LOSS = resolve(MethodOptions(linkage=Linkage.LOSS))


def random_energies(seed: int, experts: int = EXPERTS, harm: float = 0.1) -> NeuronEnergies:
    """Energies in which experts differ a lot, and so do their neurons."""
    numbers = torch.Generator().manual_seed(seed)
    own_EI = torch.rand(experts, NEURONS, generator=numbers) ** 3 * torch.rand(experts, 1, generator=numbers)
    harm_EEI = harm * torch.rand(experts, experts, NEURONS, generator=numbers) * own_EI
    harm_EEI.diagonal(dim1=0, dim2=1).zero_()
    return NeuronEnergies.of(own_EI, harm_EEI, range(experts))


def lost(energies: NeuronEnergies, members: tuple[int, ...]) -> float:
    """What one expert made of some loses, neuron by neuron."""
    gains = []
    for expert in members:
        for neuron in range(NEURONS):
            own = float(energies.own_UI[expert, neuron])
            harm = sum(float(energies.harm_UUI[other, expert, neuron]) for other in members)
            gains.append(own * own / (own + harm) if own else 0.0)
    total = sum(float(energies.own_UI[expert, neuron]) for expert in members for neuron in range(NEURONS))
    return (total - sum(sorted(gains)[-NEURONS:])) / energies.total


def by_hand(energies: NeuronEnergies) -> list[tuple[set[int], float]]:
    """Every merge: the union, and what it adds to the loss."""
    clusters = [(expert,) for expert in range(len(energies.own_UI))]
    found = []
    while len(clusters) > 1:
        pairs = [
            (lost(energies, first + second) - lost(energies, first) - lost(energies, second), first, second)
            for first, second in combinations(clusters, 2)
        ]
        added, first, second = min(pairs)
        clusters = sorted([cluster for cluster in clusters if cluster not in (first, second)] + [first + second])
        found.append((set(first + second), added))
    return found


def unions(energies: NeuronEnergies) -> list[set[int]]:
    """The unions of the tree, in order."""
    tree = loss_linkage(energies, 1).tree
    assert tree is not None
    members = {expert: {expert} for expert in range(len(energies.place_E))}
    for number, (left, right, _, size) in enumerate(tree):
        members[len(energies.place_E) + number] = members[int(left)] | members[int(right)]
        assert len(members[len(energies.place_E) + number]) == size
    return list(members.values())[len(energies.place_E) :]


@pytest.mark.parametrize("harm", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_merges_and_what_they_lose_are_those_of_a_computation_by_hand(seed: int, harm: float) -> None:
    energies = random_energies(seed, harm=harm)
    expected = by_hand(energies)
    assert unions(energies) == [union for union, _ in expected]
    heights = loss_linkage(energies, 1).clusters.heights
    assert heights == pytest.approx([added for _, added in expected], abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_pairs_lose_what_a_computation_by_hand_says(seed: int) -> None:
    energies = random_energies(seed)
    losses_EE = pair_losses(energies)
    assert (losses_EE == losses_EE.T).all()
    assert (losses_EE.diagonal() == 0).all()
    for first, second in combinations(range(EXPERTS), 2):
        assert losses_EE[first, second] == pytest.approx(lost(energies, (first, second)), abs=1e-6)


def test_heights_of_all_merges_add_up_to_what_the_clusters_lose() -> None:
    energies = random_energies(0)
    for count in range(1, EXPERTS + 1):
        clusters = loss_linkage(energies, count).clusters
        whole = sum(lost(energies, members) for members in clusters.members)
        assert len(clusters.members) == count
        assert sum(clusters.heights) == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("harm", [0.1, 10.0])
def test_heights_rise_in_the_tree_even_where_a_merge_makes_the_next_one_cheap(harm: float) -> None:
    grouping = loss_linkage(random_energies(1, harm=harm), 3)
    assert grouping.tree is not None
    assert (np.diff(grouping.tree[:, 2]) >= 0).all()
    heights = grouping.clusters.heights
    assert (np.maximum.accumulate(heights) == grouping.tree[: len(heights), 2]).all()


def test_fewer_clusters_are_unions_of_more_clusters() -> None:
    energies = random_energies(2)
    for count in range(1, EXPERTS):
        fewer, more = (loss_linkage(energies, number).clusters for number in (count, count + 1))
        pairs = zip(more.labels, fewer.labels, strict=True)
        assert len(set(pairs)) == count + 1


def test_experts_whose_neurons_never_meet_merge_by_their_least_energy() -> None:
    own_EI = torch.tensor([[5.0, 4.0], [3.0, 0.5], [0.2, 0.1]])
    energies = NeuronEnergies.of(own_EI, torch.zeros(3, 3, 2), range(3))
    grouping = loss_linkage(energies, 2)
    # Both others would lose all of the third one: the lowest number comes first.
    assert grouping.clusters.labels == (0, 1, 0)
    assert grouping.clusters.heights == pytest.approx([0.3 / 12.8])


def test_copies_merge_first_and_lose_nothing() -> None:
    apart = random_energies(0, experts=3)
    energies = NeuronEnergies.of(apart.own_UI, apart.harm_UUI, (0, 1, 0, 2, 1, 0))
    grouping = loss_linkage(energies, 3)
    assert grouping.clusters == Clusters(labels=(0, 1, 0, 2, 1, 0), heights=(0.0, 0.0, 0.0))
    assert loss_linkage(energies, 1).clusters.heights[3:] == loss_linkage(apart, 1).clusters.heights
    losses_EE = pair_losses(energies)
    assert losses_EE[0, 2] == losses_EE[1, 4] == 0
    assert losses_EE[0, 1] == losses_EE[2, 4] == pair_losses(apart)[0, 1] > 0


def test_a_layer_that_no_token_reaches_still_has_k_clusters() -> None:
    energies = NeuronEnergies.of(torch.zeros(4, 3), torch.zeros(4, 4, 3), range(4))
    grouping = loss_linkage(energies, 2)
    assert (grouping.clusters.labels, grouping.clusters.heights) == ((0, 0, 0, 1), (0.0, 0.0))


def test_a_single_expert_is_one_cluster() -> None:
    energies = NeuronEnergies.of(torch.ones(1, 3), torch.zeros(1, 1, 3), range(1))
    assert loss_linkage(energies, 1).clusters == Clusters(labels=(0,))
    assert pair_losses(energies).tolist() == [[0.0]]


def test_the_energies_are_not_changed() -> None:
    energies = random_energies(0)
    before = energies.harm_UUI.clone()
    loss_linkage(energies, 2)
    assert torch.equal(energies.harm_UUI, before)


def grouped(energies: NeuronEnergies, count: int, protected: frozenset[int] = frozenset(), **more: int) -> Clusters:
    recipe = resolve(MethodOptions(linkage=Linkage.LOSS, dominant=Dominant.CENTER, **more))  # type: ignore[arg-type]
    distances = [pair_losses(energies)]
    scores = [1.0] * len(energies.place_E)
    return group_experts(distances, count, recipe, score_E=scores, protected=protected, energies=energies).clusters


def test_protected_experts_stay_alone_and_heights_are_shares_of_the_whole_layer() -> None:
    energies = random_energies(3)
    clusters = grouped(energies, 4, frozenset({1, 5}))
    assert (1,) in clusters.members
    assert (5,) in clusters.members
    assert sum(clusters.heights) == pytest.approx(sum(lost(energies, found) for found in clusters.members), abs=1e-6)


def test_no_cluster_is_larger_than_the_limit() -> None:
    clusters = grouped(random_energies(4), 3, max_cluster_size=3)
    assert {len(members) for members in clusters.members} == {3}


def shuffled(energies: NeuronEnergies, order: Tensor) -> NeuronEnergies:
    return NeuronEnergies.of(energies.own_UI[order], energies.harm_UUI[order][:, order], range(len(order)))


def test_permuting_the_experts_permutes_the_partition() -> None:
    energies, order = random_energies(5), torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(0))
    found, moved = loss_linkage(energies, 4).clusters, loss_linkage(shuffled(energies, order), 4).clusters
    assert {frozenset(members) for members in found.members} == {
        frozenset(int(order[expert]) for expert in members) for members in moved.members
    }


@pytest.mark.parametrize("width", [1, 3, 6])
def test_narrower_experts_are_united_where_the_least_is_lost_on_top_of_what_they_lose_alone(width: int) -> None:
    energies = replace(random_energies(3), width=width)

    def lost_by(members: tuple[int, ...]) -> float:
        harm = energies.harm_UUI[list(members)][:, list(members)].sum(0)
        own = energies.own_UI[list(members)]
        kept = (own * own / (own + harm)).flatten().sort(descending=True).values[:width]
        return float(own.sum() - kept.sum())

    pairs = {pair: lost_by(pair) - lost_by(pair[:1]) - lost_by(pair[1:]) for pair in combinations(range(EXPERTS), 2)}
    matrix = pair_losses(energies)
    for (first, second), added in pairs.items():
        assert matrix[first, second] == pytest.approx(max(added, 0) / energies.total, rel=1e-4, abs=1e-9)
    found = loss_linkage(energies, EXPERTS - 1).clusters
    assert next(members for members in found.members if len(members) == 2) == min(pairs, key=lambda pair: pairs[pair])


def test_the_width_of_a_part_is_that_of_the_whole() -> None:
    assert replace(random_energies(0), width=4).part([2, 5]).width == 4
