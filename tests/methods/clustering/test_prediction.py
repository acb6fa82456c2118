"""Loss tables: what fewer and narrower experts lose, found without converting anything."""

import numpy as np
import pytest
import torch

from hcsmoe_hub.methods.clustering import NeuronEnergies, loss_linkage, loss_table

EXPERTS, NEURONS = 6, 8


def random_energies(seed: int = 0) -> NeuronEnergies:
    numbers = torch.Generator().manual_seed(seed)
    own_EI = torch.rand(EXPERTS, NEURONS, generator=numbers) ** 3 * torch.rand(EXPERTS, 1, generator=numbers)
    harm_EEI = 0.1 * torch.rand(EXPERTS, EXPERTS, NEURONS, generator=numbers) * own_EI
    harm_EEI.diagonal(dim1=0, dim2=1).zero_()
    return NeuronEnergies.of(own_EI, harm_EEI, range(EXPERTS))


def test_nothing_is_lost_where_all_experts_keep_all_neurons() -> None:
    assert loss_table(random_energies(), [EXPERTS], [NEURONS]).lost(EXPERTS, NEURONS) == pytest.approx(0, abs=1e-7)


def test_fewer_experts_lose_what_the_merges_of_the_linkage_add_up_to() -> None:
    energies = random_energies()
    table = loss_table(energies, range(1, EXPERTS + 1), [NEURONS])
    for clusters in range(1, EXPERTS + 1):
        heights = loss_linkage(energies, clusters).clusters.heights
        assert table.lost(clusters, NEURONS) == pytest.approx(sum(heights), abs=1e-6)


def test_narrower_experts_lose_their_weakest_neurons() -> None:
    energies = random_energies()
    table = loss_table(energies, [EXPERTS], [3])
    weakest = energies.own_UI.sort(dim=1).values[:, : NEURONS - 3].sum()
    assert table.lost(EXPERTS, 3) == pytest.approx(float(weakest) / energies.total, abs=1e-6)


def test_losses_fall_with_every_expert_and_every_neuron_that_stays() -> None:
    lost_KW = loss_table(random_energies(1), range(1, EXPERTS + 1), range(1, NEURONS + 1)).lost_KW
    assert (np.diff(lost_KW, axis=0) <= 1e-9).all()
    assert (np.diff(lost_KW, axis=1) <= 1e-9).all()
    assert lost_KW.min() >= 0
    assert lost_KW.max() <= 1


def test_copies_of_an_expert_become_one_at_no_loss() -> None:
    numbers = torch.Generator().manual_seed(0)
    energies = NeuronEnergies.of(torch.rand(2, 4, generator=numbers), torch.zeros(2, 2, 4), (0, 0, 1, 1))
    table = loss_table(energies, [4, 3, 2, 1], [4])
    assert table.lost_KW[:3, 0].tolist() == pytest.approx([0, 0, 0], abs=1e-7)
    assert table.lost(1, 4) > 0.1


def test_a_layer_without_any_output_loses_nothing() -> None:
    energies = NeuronEnergies.of(torch.zeros(3, 4), torch.zeros(3, 3, 4), range(3))
    assert (loss_table(energies, [3, 1], [4, 1]).lost_KW == 0).all()


@pytest.mark.parametrize(("experts", "widths"), [([0], [1]), ([EXPERTS + 1], [1]), ([1], [0]), ([1], [NEURONS + 1])])
def test_numbers_that_a_layer_does_not_have_are_refused(experts: list[int], widths: list[int]) -> None:
    with pytest.raises(ValueError, match="there are 1 to"):
        loss_table(random_energies(), experts, widths)
