"""Energies of neurons are those of a computation token by token, in every layout of experts."""

from typing import Any

import pytest
import torch
from architectures import EXPERTS
from tiny_experts import LAYOUTS, load_rows, rows_of, sample_of, tiny_experts, view_of
from torch import Tensor

from hcsmoe_hub.layer import neuron_energies
from hcsmoe_hub.layer.neuron_energies import RoutedTokens, energies_on, even_tokens
from hcsmoe_hub.methods.clustering import NeuronEnergies
from hcsmoe_hub.methods.merging import find_copies
from hcsmoe_hub.model.expert_kinds import experts_of

APART = tuple(range(EXPERTS))


def routed_tokens(module: Any, tokens: int = 40) -> RoutedTokens:
    sample = sample_of(module, tokens)
    return RoutedTokens(tokens_TH=sample.tokens_TH, index_TK=sample.index_TK, weight_TK=sample.weight_TK)


def collected(module: Any, routed: RoutedTokens, places: tuple[int, ...] = APART) -> NeuronEnergies:
    return energies_on(routed, experts_of(module), view_of(module)(rows_of(module)), places)


def by_hand(module: Any, routed: RoutedTokens) -> tuple[Tensor, Tensor]:
    """Energies by their definition, one token and one choice at a time."""
    experts, neurons = experts_of(module), view_of(module)(rows_of(module))
    size_EI = neurons.outputs[0].square().sum(-1)
    own_EI = torch.zeros_like(size_EI)
    harm_EEI = torch.zeros(EXPERTS, *size_EI.shape)
    for token_H, index_K, weight_K in zip(routed.tokens_TH, routed.index_TK, routed.weight_TK, strict=True):
        chosen = {int(index): float(weight) for index, weight in zip(index_K, weight_K, strict=True) if index >= 0}
        for wanted, weight in chosen.items():
            scale = weight if experts.scales_input else 1.0
            factor = 1.0 if experts.scales_input else weight**2
            for expert in range(EXPERTS):
                with torch.no_grad():
                    activation_I = experts.hidden(expert, scale * token_H[None])[0]
                energy_I = factor * activation_I.square() * size_EI[expert]
                if expert == wanted:
                    own_EI[expert] += energy_I
                elif expert not in chosen:
                    harm_EEI[wanted, expert] += energy_I
    return own_EI, harm_EEI


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_energies_are_those_of_a_computation_token_by_token(model_type: str) -> None:
    module = tiny_experts(model_type)
    routed = routed_tokens(module)
    found, (own_EI, harm_EEI) = collected(module, routed), by_hand(module, routed)
    assert torch.allclose(found.own_UI, own_EI, rtol=1e-4)
    assert torch.allclose(found.harm_UUI, harm_EEI, rtol=1e-4)
    assert found.total == pytest.approx(float(own_EI.sum()), rel=1e-5)


@pytest.mark.parametrize("model_type", ["mixtral", "llama4_text"])
def test_the_size_of_chunks_does_not_matter(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_experts(model_type)
    routed = routed_tokens(module)
    whole = collected(module, routed)
    monkeypatch.setattr(neuron_energies, "ENERGY_CHUNK", 100)
    parts = collected(module, routed)
    assert torch.allclose(parts.own_UI, whole.own_UI, rtol=1e-4)
    assert torch.allclose(parts.harm_UUI, whole.harm_UUI, rtol=1e-4)


def test_an_expert_that_a_token_names_twice_counts_with_the_sum_of_its_weights() -> None:
    module = tiny_experts("mixtral")
    tokens_TH = routed_tokens(module, 5).tokens_TH
    twice = RoutedTokens(
        tokens_TH=tokens_TH, index_TK=torch.full((5, 2), 3), weight_TK=torch.tensor([[0.5, 0.25]]).expand(5, 2)
    )
    once = RoutedTokens(
        tokens_TH=tokens_TH, index_TK=torch.tensor([[3, -1]]).expand(5, 2), weight_TK=torch.full((5, 2), 0.75)
    )
    assert torch.allclose(collected(module, twice).own_UI, collected(module, once).own_UI)
    assert torch.allclose(collected(module, twice).harm_UUI, collected(module, once).harm_UUI)


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_copies_are_found_in_whatever_order_their_neurons_are(model_type: str) -> None:
    module = tiny_experts(model_type)
    rows = rows_of(module)
    for tensor in rows.values():
        tensor[4], tensor[5] = tensor[1].clone(), tensor[1].clone()
    neurons = view_of(module)(rows)
    for expert in (4, 5):
        order = torch.randperm(neurons.size, generator=torch.Generator().manual_seed(expert))
        neurons.permute(expert, order)
    assert find_copies(neurons) == (0, 1, 2, 3, 1, 1)
    # One number makes another expert.
    neurons.outputs[0][5, 0, 0] += 1e-3
    assert find_copies(neurons) == (0, 1, 2, 3, 1, 4)


def test_copies_are_one_expert_that_is_chosen_where_any_of_them_is() -> None:
    module = tiny_experts("mixtral")
    rows = rows_of(module)
    load_rows(module, {name: tensor[[0, 1, 2, 3, 1, 0]].clone() for name, tensor in rows.items()})
    routed = routed_tokens(module)
    found = collected(module, routed, (0, 1, 2, 3, 1, 0))
    folded = RoutedTokens(
        tokens_TH=routed.tokens_TH,
        index_TK=torch.tensor([0, 1, 2, 3, 1, 0, -1])[routed.index_TK],
        weight_TK=routed.weight_TK,
    )
    expected = collected(module, folded)
    assert torch.allclose(found.own_UI, expected.own_UI[:4], rtol=1e-4)
    assert torch.allclose(found.harm_UUI, expected.harm_UUI[:4, :4], rtol=1e-4)
    assert found.first_U == (0, 1, 2, 3)


def test_tokens_are_taken_at_even_distances() -> None:
    assert even_tokens(5).tolist() == [0, 1, 2, 3, 4]
    many = even_tokens(131072)
    assert (len(many), int(many[0]), int(many[-1])) == (8192, 0, 131071)
    assert set(many.diff().tolist()) <= {15, 16, 17}
