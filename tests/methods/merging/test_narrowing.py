"""Which neurons an expert keeps, and what is left of its tensors."""

import pytest
import torch
from torch import Tensor

from hcsmoe_hub.methods.clustering import NeuronEnergies
from hcsmoe_hub.methods.merging.best_neurons import best_neurons
from hcsmoe_hub.methods.merging.narrowing import best, best_of_experts, magnitudes, narrow
from hcsmoe_hub.methods.merging.neurons import Neurons
from hcsmoe_hub.model.neurons import sort_neurons

EXPERTS, NEURONS, HIDDEN = 3, 6, 4


def interleaved(rows: dict[str, Tensor]) -> Neurons:
    """Experts as gpt-oss stores them: gate and up alternate, and everything has a bias."""
    return sort_neurons(
        rows,
        inputs={"gate_up": (2, 2), "gate_up_bias": (1, 2)},
        outputs={"down": 1},
        others=("down_bias",),
        is_interleaved=True,
    )


@pytest.fixture
def rows() -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(0)
    shapes = {
        "gate_up": (EXPERTS, HIDDEN, 2 * NEURONS),
        "gate_up_bias": (EXPERTS, 2 * NEURONS),
        "down": (EXPERTS, NEURONS, HIDDEN),
        "down_bias": (EXPERTS, HIDDEN),
    }
    return {name: torch.randn(shape, generator=numbers) for name, shape in shapes.items()}


def test_neurons_of_the_greatest_score_are_kept_in_their_order() -> None:
    score = torch.tensor([1.0, 5.0, 3.0, 4.0, 2.0])
    assert best(score, torch.ones(5), 3, guarded=0).tolist() == [1, 2, 3]


def test_magnitude_decides_among_equal_scores_and_the_lower_number_among_equal_neurons() -> None:
    score, magnitude = torch.tensor([1.0, 1.0, 1.0, 9.0]), torch.tensor([1.0, 3.0, 2.0, 1.0])
    assert best(score, magnitude, 2, guarded=0).tolist() == [1, 3]
    assert best(torch.zeros(4), torch.ones(4), 2, guarded=0).tolist() == [0, 1]


def test_a_few_neurons_stay_for_their_magnitude_whatever_they_score() -> None:
    score, magnitude = torch.tensor([9.0, 8.0, 7.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 5.0])
    assert best(score, magnitude, 2, guarded=1).tolist() == [0, 3]


def test_never_more_neurons_are_guarded_than_kept() -> None:
    assert best(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 3.0]), 1, guarded=3).tolist() == [2]


def test_every_expert_chooses_its_own_neurons() -> None:
    score = torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 4.0, 2.0, 3.0]])
    assert best_of_experts(score, score, 2).tolist() == [[0, 2], [1, 3]]


def test_the_magnitude_of_a_neuron_is_the_product_of_its_two_sides(rows: dict[str, Tensor]) -> None:
    found = magnitudes(interleaved(rows))
    gate, up = rows["gate_up"][1, :, 4], rows["gate_up"][1, :, 5]
    bias, down = rows["gate_up_bias"][1, 4:6], rows["down"][1, 2]
    read = torch.cat([gate, up, bias]).norm()
    assert found.shape == (EXPERTS, NEURONS)
    assert found[1, 2].item() == pytest.approx((read * down.norm()).item(), rel=1e-5)


def test_narrower_experts_compute_with_what_is_left_of_their_neurons(rows: dict[str, Tensor]) -> None:
    kept = torch.tensor([[0, 3], [1, 2], [4, 5]])
    shapes = {"gate_up": (HIDDEN, 4), "gate_up_bias": (4,), "down": (2, HIDDEN), "down_bias": (HIDDEN,)}
    found = narrow(rows, interleaved, kept, shapes)
    assert {name: tensor.shape[1:] for name, tensor in found.items()} == shapes
    for expert, neurons in enumerate(kept.tolist()):
        pairs = [place for neuron in neurons for place in (2 * neuron, 2 * neuron + 1)]
        assert torch.equal(found["gate_up"][expert], rows["gate_up"][expert][:, pairs])
        assert torch.equal(found["gate_up_bias"][expert], rows["gate_up_bias"][expert, pairs])
        assert torch.equal(found["down"][expert], rows["down"][expert, neurons])
    assert torch.equal(found["down_bias"], rows["down_bias"])


def energies(own: Tensor, *, width: int, magnitude: Tensor | None = None) -> NeuronEnergies:
    """Energies of experts that harm nobody."""
    harm = torch.zeros(len(own), *own.shape)
    whole = NeuronEnergies.of(own, harm, range(len(own)), magnitude_UI=magnitude)
    return NeuronEnergies(
        own_UI=whole.own_UI,
        harm_UUI=whole.harm_UUI,
        place_E=whole.place_E,
        magnitude_UI=whole.magnitude_UI,
        width=width,
        total=whole.total,
    )


def kept_by(found: NeuronEnergies, members: list[int]) -> dict[int, list[int]]:
    return {expert: neurons.tolist() for expert, neurons, _ in best_neurons(found, members)}


def test_a_narrower_merged_expert_takes_the_best_neurons_of_all_members() -> None:
    own = torch.tensor([[8.0, 1.0, 6.0, 2.0], [3.0, 7.0, 0.5, 5.0]])
    assert kept_by(energies(own, width=3, magnitude=own), [0, 1]) == {0: [0, 2], 1: [1]}


def test_an_expert_that_is_alone_is_narrower_as_well() -> None:
    own = torch.tensor([[8.0, 1.0, 6.0, 2.0], [3.0, 7.0, 0.5, 5.0]])
    assert kept_by(energies(own, width=2, magnitude=own), [1]) == {1: [1, 3]}


def test_where_no_token_arrived_the_neurons_of_the_greatest_magnitude_stay() -> None:
    magnitude = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    assert kept_by(energies(torch.zeros(1, 4), width=2, magnitude=magnitude), [0]) == {0: [1, 3]}
