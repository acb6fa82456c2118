"""Merged experts of whole neurons: the best ones of all members, as they are but for the scale of what they add."""

import pytest
import torch
from architectures import EXPERTS
from tiny_experts import LAYOUTS, rows_of, tiny_experts, view_of
from torch import Tensor

from hcsmoe_hub.methods.clustering import Clusters, Grouping, NeuronEnergies
from hcsmoe_hub.methods.merging import MergeGroups, Neurons, find_copies, member_shares, merge_experts
from hcsmoe_hub.options import Merge, MethodOptions
from hcsmoe_hub.recipe.resolve import resolve

CLUSTERS = Clusters.of([0, 1, 0, 2, 1, 0])
DOMINANTS = (2, 1, 3)
USAGE = [3, 1, 4, 1, 5, 9]
NEURONS = resolve(MethodOptions(merge=Merge.NEURONS))


def random_energies(neurons: int, places: tuple[int, ...] = tuple(range(EXPERTS))) -> NeuronEnergies:
    numbers = torch.Generator().manual_seed(0)
    count = max(places) + 1
    own_UI = torch.rand(count, neurons, generator=numbers) ** 2
    harm_UUI = torch.rand(count, count, neurons, generator=numbers) * own_UI
    harm_UUI.diagonal(dim1=0, dim2=1).zero_()
    return NeuronEnergies.of(own_UI, harm_UUI, places)


def merge(
    model_type: str, rows: dict[str, Tensor], energies: NeuronEnergies, clusters: Clusters = CLUSTERS
) -> dict[str, Tensor]:
    share_EC = member_shares(Grouping(clusters=clusters), Merge.NEURONS, usage_E=USAGE)
    dominants = clusters.dominant(USAGE) if clusters is not CLUSTERS else DOMINANTS
    groups = MergeGroups(clusters=clusters, dominants=dominants, share_EC=share_EC)
    view = view_of(tiny_experts(model_type))
    return merge_experts(rows, view, groups=groups, recipe=NEURONS, energies=energies).tensors


def source(model_type: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Neurons]:
    rows = {name: tensor.to(dtype) for name, tensor in rows_of(tiny_experts(model_type)).items()}
    return rows, view_of(tiny_experts(model_type))(rows)


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_every_neuron_is_one_of_the_best_and_scaled_by_its_share_of_its_energy(model_type: str) -> None:
    rows, neurons = source(model_type)
    energies = random_energies(neurons.size)
    merged = view_of(tiny_experts(model_type))(merge(model_type, rows, energies))
    for number, members in enumerate(CLUSTERS.members):
        found = []
        for expert in members:
            harm_I = sum((energies.harm_UUI[other, expert] for other in members), torch.zeros(neurons.size))
            own_I = energies.own_UI[expert]
            found += [
                (float(own * own / (own + harm)), expert, neuron, float(own / (own + harm)))
                for neuron, (own, harm) in enumerate(zip(own_I, harm_I, strict=True))
            ]
        best = sorted(sorted(found, reverse=True)[: neurons.size], key=lambda item: item[1:3])
        for place, (_, expert, neuron, scale) in enumerate(best):
            for tensor, original in zip(merged.inputs, neurons.inputs, strict=True):
                assert torch.equal(tensor[number, place], original[expert, neuron])
            for tensor, original in zip(merged.outputs, neurons.outputs, strict=True):
                assert torch.allclose(tensor[number, place], original[expert, neuron] * scale, rtol=1e-5)


def test_what_belongs_to_no_neuron_is_averaged_by_usage() -> None:
    rows, neurons = source("gpt_oss")
    (bias,) = view_of(tiny_experts("gpt_oss"))(merge("gpt_oss", rows, random_energies(neurons.size))).others
    expected = (3 * rows["down_proj_bias"][0] + 4 * rows["down_proj_bias"][2] + 9 * rows["down_proj_bias"][5]) / 16
    assert torch.allclose(bias[0], expected, atol=1e-6)
    assert torch.equal(bias[2], rows["down_proj_bias"][3])


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_an_expert_that_is_alone_keeps_its_bits_and_the_source_is_not_changed(model_type: str) -> None:
    rows, neurons = source(model_type, torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in rows.items()}
    for name, tensor in merge(model_type, rows, random_energies(neurons.size)).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor[2], rows[name][3])
        assert torch.equal(rows[name], before[name])


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_as_many_clusters_as_experts_is_the_identity(model_type: str) -> None:
    rows, neurons = source(model_type, torch.float16)
    apart = Clusters.of(range(EXPERTS))
    for name, tensor in merge(model_type, rows, random_energies(neurons.size), apart).items():
        assert torch.equal(tensor, rows[name])


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_shuffled_copies_become_their_dominant_expert_bit_for_bit(model_type: str) -> None:
    rows, neurons = source(model_type)
    for tensor in rows.values():
        tensor[:] = tensor[0].clone()
    for expert in range(1, EXPERTS):
        neurons.permute(expert, torch.randperm(neurons.size, generator=torch.Generator().manual_seed(expert)))
    places = find_copies(neurons)
    assert set(places) == {0}
    for name, tensor in merge(model_type, rows, random_energies(neurons.size, places)).items():
        assert torch.equal(tensor, rows[name][list(DOMINANTS)])


def test_a_cluster_that_no_token_reached_keeps_its_first_expert() -> None:
    rows, neurons = source("mixtral")
    nothing = NeuronEnergies.of(
        torch.zeros(EXPERTS, neurons.size), torch.zeros(EXPERTS, EXPERTS, neurons.size), range(EXPERTS)
    )
    for name, tensor in merge("mixtral", rows, nothing).items():
        assert torch.equal(tensor, rows[name][[0, 1, 3]])
