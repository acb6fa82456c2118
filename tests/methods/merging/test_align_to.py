"""Alignment to the first expert of a layer, as in M-SMoE, or to the dominant expert of each cluster."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import EXPERTS
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from tiny_experts import LAYOUTS, load_rows, outputs_of, rows_of, sample_of, tiny_experts, view_of
from torch import Tensor

from hcsmoe_hub.methods.clustering import Clusters, Grouping
from hcsmoe_hub.methods.merging import MergeGroups, member_shares, merge_experts
from hcsmoe_hub.methods.merging.neuron_features import standardise
from hcsmoe_hub.options import Align, AlignTo, Merge, MethodOptions
from hcsmoe_hub.recipe.resolve import resolve

# The first expert is alone in one of them, and a member that is not dominant in another.
WITHOUT_FIRST, WITH_FIRST = Clusters.of([0, 1, 2, 1, 2, 1]), Clusters.of([0, 1, 0, 1, 0, 1])
USAGE = [3, 1, 4, 1, 5, 9]


def merged(
    module: torch.nn.Module,
    align_to: AlignTo | None,
    clusters: Clusters = WITHOUT_FIRST,
    dominants: Sequence[int] = (0, 5, 4),
    align: Align = Align.WEIGHT,
) -> dict[str, Tensor]:
    """Experts merged by frequency."""
    shares = member_shares(Grouping(clusters=clusters), Merge.FREQUENCY, usage_E=USAGE)
    groups = MergeGroups(clusters=clusters, dominants=dominants, share_EC=shares)
    recipe = replace(resolve(MethodOptions(align=align)), align_to=align_to)
    found = merge_experts(rows_of(module), view_of(module), groups=groups, recipe=recipe, sample=sample_of(module))
    return found.tensors


def weights(module: torch.nn.Module, expert: int) -> list[NDArray[np.float64]]:
    """All matrices and biases of an expert, ``[I, ...]`` each."""
    neurons = view_of(module)(rows_of(module))
    return [tensor[expert].double().numpy() for tensor in (*neurons.inputs, *neurons.outputs)]


def aligned_mean(module: torch.nn.Module, members: Sequence[int], anchor: int) -> list[NDArray[np.float64]]:
    """The weighted mean of permuted experts, by section 3.1 and equation 2 of arXiv 2310.01334.

    The permutation P maximises ``<W_in, P W_in'> + <W_out, W_out' P^T>``.
    """
    target, total = weights(module, anchor), sum(USAGE[member] for member in members)
    means = [np.zeros_like(part) for part in target]
    for member in members:
        own = weights(module, member)
        pairs = [(a.reshape(len(a), -1), b.reshape(len(b), -1)) for a, b in zip(target, own, strict=True)]
        _, order = linear_sum_assignment(sum(a @ b.T for a, b in pairs), maximize=True)
        for mean, part in zip(means, own, strict=True):
            mean += USAGE[member] / total * part[order]
    return means


def parts_of(module: torch.nn.Module, tensors: Mapping[str, Tensor], number: int) -> list[NDArray[np.float64]]:
    neurons = view_of(module)(tensors)
    return [tensor[number].double().numpy() for tensor in (*neurons.inputs, *neurons.outputs)]


@pytest.mark.parametrize("model_type", LAYOUTS)
@pytest.mark.parametrize(
    ("clusters", "dominants"), [(WITHOUT_FIRST, (0, 5, 4)), (WITH_FIRST, (4, 5))], ids=["outside", "inside"]
)
def test_the_anchor_is_the_one_that_is_asked_for(model_type: str, clusters: Clusters, dominants: Sequence[int]) -> None:
    module = tiny_experts(model_type)
    for align_to, anchors in ((AlignTo.FIRST, [0] * len(dominants)), (AlignTo.DOMINANT, dominants)):
        tensors = merged(module, align_to, clusters, dominants)
        for number, members in enumerate(clusters.members):
            expected = aligned_mean(module, members, anchors[number])
            for found, mean in zip(parts_of(module, tensors, number), expected, strict=True):
                np.testing.assert_allclose(found, mean, rtol=0, atol=1e-6)
    first, dominant = (merged(module, align_to, clusters, dominants) for align_to in AlignTo)
    assert any(not torch.allclose(first[name], dominant[name], atol=1e-3) for name in first)


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_activations_are_matched_with_those_of_the_first_expert(model_type: str) -> None:
    module = tiny_experts(model_type)
    sample, number = sample_of(module), 2
    tensors = merged(module, AlignTo.FIRST, align=Align.ACTIVATION)
    hidden = [standardise(sample.hidden(expert, sample.tokens_TH)).double().numpy() for expert in range(EXPERTS)]
    members, total = WITHOUT_FIRST.members[number], 9
    expected = [np.zeros_like(part) for part in weights(module, 0)]
    for member in members:
        _, order = linear_sum_assignment(hidden[0].T @ hidden[member], maximize=True)
        for mean, part in zip(expected, weights(module, member), strict=True):
            mean += USAGE[member] / total * part[order]
    for found, mean in zip(parts_of(module, tensors, number), expected, strict=True):
        np.testing.assert_allclose(found, mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model_type", LAYOUTS)
@pytest.mark.parametrize("align", [Align.WEIGHT, Align.ACTIVATION])
def test_an_expert_that_is_merged_with_unused_ones_computes_what_it_did(model_type: str, align: Align) -> None:
    # Shares of 1 and 0: what is written is the most used expert, in the order of the first.
    module, clusters, dominants = tiny_experts(model_type), Clusters.of([0, 1, 1, 1, 2, 2]), (0, 2, 5)
    tokens_TH = sample_of(module).tokens_TH
    before, rows = outputs_of(module, tokens_TH), rows_of(module)
    share_EC = torch.zeros(EXPERTS, 3, dtype=torch.float64)
    share_EC[list(dominants), range(3)] = 1
    groups = MergeGroups(clusters=clusters, dominants=dominants, share_EC=share_EC)
    recipe = resolve(MethodOptions(align=align, align_to=AlignTo.FIRST))
    found = merge_experts(rows, view_of(module), groups=groups, recipe=recipe, sample=sample_of(module)).tensors
    name = next(name for name, tensor in found.items() if tensor.dim() > 2)
    assert torch.equal(found[name][0], rows[name][0])
    assert not torch.equal(found[name][1], rows[name][2])
    load_rows(module, {name: tensor[list(clusters.labels)] for name, tensor in found.items()})
    after = outputs_of(module, tokens_TH)
    for number, expert in enumerate(dominants):
        assert torch.allclose(after[expert], before[expert], rtol=1e-4, atol=1e-6), number


@pytest.mark.parametrize("align_to", AlignTo)
def test_the_order_of_clusters_does_not_matter(align_to: AlignTo) -> None:
    module = tiny_experts("gpt_oss")
    expected = merged(module, align_to)
    turned = Clusters(labels=tuple(2 - label for label in WITHOUT_FIRST.labels))
    for name, tensor in merged(module, align_to, turned, (4, 5, 0)).items():
        assert torch.equal(tensor, expected[name].flip(0))


def test_dominant_experts_do_not_matter_where_the_first_is_the_anchor() -> None:
    module = tiny_experts("mixtral")
    one, other = (merged(module, AlignTo.FIRST, dominants=dominants) for dominants in ((0, 5, 4), (0, 1, 2)))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_no_anchor_is_the_dominant_expert() -> None:
    module = tiny_experts("mixtral")
    one, other = (merged(module, align_to) for align_to in (None, AlignTo.DOMINANT))
    assert all(torch.equal(one[name], other[name]) for name in one)
