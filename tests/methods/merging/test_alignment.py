"""Alignment finds the order in which neurons were shuffled, and never changes what an expert computes."""

from itertools import permutations

import pytest
import torch
from architectures import EXPERTS
from tiny_experts import LAYOUTS, outputs_of, rows_of, sample_of, tiny_experts, view_of

from hcsmoe_hub.methods.merging.alignment import align_neurons, alignment_features, match_neurons
from hcsmoe_hub.methods.merging.neuron_features import standardise
from hcsmoe_hub.options import Align

ALIGNMENTS = [Align.WEIGHT, Align.ACTIVATION]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def order(size: int, seed: int) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(10))
def test_the_matching_has_the_greatest_total_similarity_of_all(seed: int) -> None:
    similarity = random(6, 6, seed=seed)
    best = max(permutations(range(6)), key=lambda order: float(similarity[range(6), list(order)].double().sum()))
    assert match_neurons(similarity).tolist() == list(best)


def test_a_greedy_choice_may_have_to_wait() -> None:
    # Neuron 0 likes column 0 best, but taking it would leave neuron 1 with nothing.
    assert match_neurons(torch.tensor([[10.0, 9.0], [8.0, 0.0]])).tolist() == [1, 0]


@pytest.mark.parametrize("model_type", LAYOUTS)
@pytest.mark.parametrize("align", ALIGNMENTS)
def test_shuffled_copies_of_one_expert_become_that_expert_again(model_type: str, align: Align) -> None:
    module = tiny_experts(model_type)
    rows, sample = rows_of(module), sample_of(module)
    for tensor in rows.values():
        tensor[:] = tensor[3].clone()
    neurons = view_of(module)(rows)
    for expert in range(EXPERTS):
        if expert != 2:
            neurons.permute(expert, order(neurons.size, expert))
    describe, is_seen = alignment_features(neurons, tuple(range(EXPERTS)), align, sample)
    assert is_seen
    assert not torch.equal(neurons.outputs[0][4], neurons.outputs[0][2])
    align_neurons(neurons, describe, anchor=2)
    for tensor in rows.values():
        assert torch.equal(tensor, tensor[2].expand_as(tensor))


@pytest.mark.parametrize("model_type", LAYOUTS)
@pytest.mark.parametrize("align", ALIGNMENTS)
def test_alignment_leaves_every_output_as_it_is(model_type: str, align: Align) -> None:
    module = tiny_experts(model_type)
    rows, sample = rows_of(module), sample_of(module)
    neurons = view_of(module)(rows)
    before = {name: tensor.clone() for name, tensor in rows.items()}
    expected = outputs_of(module, sample.tokens_TH)
    describe, _ = alignment_features(neurons, tuple(range(EXPERTS)), align, sample)
    align_neurons(neurons, describe, anchor=1)
    assert torch.allclose(outputs_of(module, sample.tokens_TH), expected, rtol=1e-4, atol=1e-6)
    for name, tensor in rows.items():
        assert torch.equal(tensor[1], before[name][1])
    assert not torch.equal(neurons.outputs[0], view_of(module)(before).outputs[0])


def test_alignment_by_weight_brings_experts_closer() -> None:
    module = tiny_experts("mixtral")
    neurons = view_of(module)(rows_of(module))

    def distance() -> float:
        parts = (*neurons.inputs, *neurons.outputs)
        return float(sum(((part[1:] - part[0]) ** 2).sum() for part in parts))

    before = distance()
    describe, _ = alignment_features(neurons, tuple(range(EXPERTS)), Align.WEIGHT, None)
    align_neurons(neurons, describe, anchor=0)
    assert distance() < 0.95 * before


def test_activations_are_compared_on_all_tokens_wherever_they_are_routed() -> None:
    module = tiny_experts("mixtral")
    sample = sample_of(module)
    describe, _ = alignment_features(view_of(module)(rows_of(module)), (4, 1), Align.ACTIVATION, sample)
    assert torch.equal(describe(1), standardise(sample.hidden(1, sample.tokens_TH)))


def test_weights_stand_in_for_activations_that_were_not_seen() -> None:
    module = tiny_experts("mixtral")
    neurons = view_of(module)(rows_of(module))
    by_weight, _ = alignment_features(neurons, (0, 1), Align.WEIGHT, None)
    for sample in (None, sample_of(module, tokens=1)):
        describe, is_seen = alignment_features(neurons, (0, 1), Align.ACTIVATION, sample)
        assert not is_seen
        assert torch.equal(describe(0), by_weight(0))


def test_there_is_nothing_to_align_by_without_alignment() -> None:
    module = tiny_experts("mixtral")
    with pytest.raises(ValueError, match="nothing to align by"):
        alignment_features(view_of(module)(rows_of(module)), (0, 1), Align.NONE, None)
