"""Every merge on every layout: what is alone stays, copies give the original back, numbers of experts do not matter."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import EXPERTS
from tiny_experts import LAYOUTS, load_rows, outputs_of, rows_of, sample_of, tiny_experts, view_of
from torch import Tensor

from hcsmoe_hub.methods.clustering import Clusters, Grouping
from hcsmoe_hub.methods.merging import Merged, MergeGroups, member_shares, merge_experts, merge_rows
from hcsmoe_hub.observation.sample import NeuronSample
from hcsmoe_hub.options import Align, AlignTo, Features, Merge, MethodOptions
from hcsmoe_hub.recipe.recipe import Recipe
from hcsmoe_hub.recipe.resolve import resolve

CLUSTERS = Clusters.of([0, 1, 0, 2, 1, 0])
DOMINANTS = (2, 1, 3)
USAGE, SALIENCY = [3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]
NEURON_MERGES = [Merge.FIX_DOM, Merge.FIX_DOM_ONE_TO_ONE, Merge.ZIPIT]
# The merge of the best neurons has a file of its own.
WHOLE_MERGES = [merge for merge in Merge if merge not in (Merge.MEMBERSHIP, Merge.NEURONS, *NEURON_MERGES)]


def recipe_of(merge: Merge, align: Align | None = None, features: Features | None = None) -> Recipe:
    weights = (2.0, 1.0) if merge is Merge.DOMINANT else None
    return resolve(MethodOptions(merge=merge, align=align, features=features, dominant_weights=weights))


# Every way to make one expert of a cluster.
RECIPES = [
    *(recipe_of(merge, align=align) for merge in WHOLE_MERGES for align in Align),
    *(recipe_of(merge, features=features) for merge in NEURON_MERGES for features in Features),
]


def name_of(recipe: Recipe) -> str:
    return f"{recipe.merge}-{recipe.align or recipe.features}"


def merge(
    model_type: str,
    rows: dict[str, Tensor],
    recipe: Recipe,
    clusters: Clusters = CLUSTERS,
    dominants: tuple[int, ...] = DOMINANTS,
    sample: NeuronSample | None = None,
    order: Sequence[int] = range(EXPERTS),
) -> Merged:
    """Merges experts in a given order; usage and saliency move along."""
    assert recipe.merge is not None
    module = tiny_experts(model_type)
    shares = member_shares(
        Grouping(clusters=clusters),
        recipe.merge,
        usage_E=[USAGE[expert] for expert in order],
        saliency_E=[SALIENCY[expert] for expert in order],
        dominants=dominants,
        dominant_weights=recipe.dominant_weights,
    )
    source = sample or sample_of(module)
    groups = MergeGroups(clusters=clusters, dominants=dominants, share_EC=shares)
    return merge_experts(rows, view_of(module), groups=groups, recipe=recipe, sample=source)


def source_rows(model_type: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in rows_of(tiny_experts(model_type)).items()}


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
@pytest.mark.parametrize("model_type", LAYOUTS)
def test_an_expert_that_is_alone_keeps_its_bits_and_the_source_is_not_changed(model_type: str, recipe: Recipe) -> None:
    rows = source_rows(model_type, torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in rows.items()}
    merged = merge(model_type, rows, recipe)
    assert merged.unseen == ()
    for name, tensor in merged.tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.shape == (3, *rows[name].shape[1:])
        assert torch.equal(tensor[2], rows[name][3])
        assert not torch.equal(tensor[0], rows[name][2])
        assert torch.equal(rows[name], before[name])


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
@pytest.mark.parametrize("model_type", LAYOUTS)
def test_as_many_clusters_as_experts_is_the_identity(model_type: str, recipe: Recipe) -> None:
    rows = source_rows(model_type, torch.float16)
    merged = merge(model_type, rows, recipe, Clusters.of(range(EXPERTS)), tuple(range(EXPERTS)))
    assert merged.tensors.keys() == rows.keys()
    for name, tensor in merged.tensors.items():
        assert torch.equal(tensor, rows[name])


def shuffled_copies(model_type: str) -> Any:
    """Experts that are one expert, their neurons in different orders."""
    module = tiny_experts(model_type)
    rows = rows_of(module)
    for tensor in rows.values():
        tensor[:] = tensor[0].clone()
    neurons = view_of(module)(rows)
    for expert in range(1, EXPERTS):
        neurons.permute(expert, torch.randperm(neurons.size, generator=torch.Generator().manual_seed(expert)))
    return module


@pytest.mark.parametrize("align", [Align.WEIGHT, Align.ACTIVATION])
@pytest.mark.parametrize("model_type", LAYOUTS)
def test_shuffled_copies_become_the_first_expert_where_this_is_the_anchor(model_type: str, align: Align) -> None:
    module = shuffled_copies(model_type)
    rows, recipe = rows_of(module), resolve(MethodOptions(align=align, align_to=AlignTo.FIRST))
    for name, tensor in merge(model_type, rows, recipe, sample=sample_of(module)).tensors.items():
        # The last one is alone.
        assert torch.allclose(tensor, rows[name][[0, 0, 3]], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "recipe",
    [recipe for recipe in RECIPES if recipe.align is not Align.NONE and recipe.merge is not Merge.ZIPIT],
    ids=name_of,
)
@pytest.mark.parametrize("model_type", LAYOUTS)
def test_shuffled_copies_become_their_dominant_expert(model_type: str, recipe: Recipe) -> None:
    module = shuffled_copies(model_type)
    rows = rows_of(module)
    for name, tensor in merge(model_type, rows, recipe, sample=sample_of(module)).tensors.items():
        assert torch.allclose(tensor, rows[name][list(DOMINANTS)], rtol=0, atol=1e-6)


@pytest.mark.parametrize("features", Features)
@pytest.mark.parametrize("model_type", LAYOUTS)
def test_two_shuffled_copies_become_the_first_in_zipit(model_type: str, features: Features) -> None:
    module = shuffled_copies(model_type)
    rows, pairs = rows_of(module), Clusters.of([0, 1, 1, 2, 0, 2])
    recipe = recipe_of(Merge.ZIPIT, features=features)
    for name, tensor in merge(model_type, rows, recipe, pairs, (4, 1, 5), sample_of(module)).tensors.items():
        assert torch.allclose(tensor, rows[name][[0, 1, 3]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
@pytest.mark.parametrize("model_type", ["gpt_oss", "nemotron_h"])
def test_the_numbers_of_experts_do_not_matter(model_type: str, recipe: Recipe) -> None:
    module = tiny_experts(model_type)
    rows, sample = rows_of(module), sample_of(module)
    expected = merge(model_type, rows, recipe, sample=sample)
    # Members of a cluster keep their sequence, because ZipIt keeps the order of neurons of the first one.
    order = [3, 0, 1, 2, 4, 5]
    place = torch.tensor(order).argsort()
    clusters = Clusters.of([CLUSTERS.labels[expert] for expert in order])
    origin = [CLUSTERS.labels[order[members[0]]] for members in clusters.members]
    dominants = tuple(int(place[DOMINANTS[number]]) for number in origin)
    assert origin == [2, 0, 1]

    moved = tiny_experts(model_type)
    load_rows(moved, {name: tensor[order] for name, tensor in rows.items()})
    index_TK = torch.where(sample.index_TK < 0, -1, place[sample.index_TK])
    moved_sample = replace(sample_of(moved), index_TK=index_TK)
    found = merge(model_type, rows_of(moved), recipe, clusters, dominants, moved_sample, order)
    for name, tensor in found.tensors.items():
        assert torch.allclose(tensor, expected.tensors[name][origin], rtol=0, atol=1e-6)


def test_a_weighted_merge_without_alignment_is_the_weighted_sum_of_every_tensor() -> None:
    rows = source_rows("gpt_oss")
    merged = merge("gpt_oss", rows, recipe_of(Merge.FREQUENCY))
    shares = member_shares(Grouping(clusters=CLUSTERS), Merge.FREQUENCY, usage_E=USAGE)
    for name, tensor in merged.tensors.items():
        assert torch.equal(tensor, merge_rows(rows[name], shares))


@pytest.mark.parametrize("model_type", LAYOUTS)
@pytest.mark.parametrize("features", Features)
def test_one_to_one_fix_dom_keeps_the_sum_of_the_down_projection(model_type: str, features: Features) -> None:
    rows = source_rows(model_type)
    view = view_of(tiny_experts(model_type))
    merged = view(merge(model_type, rows, recipe_of(Merge.FIX_DOM_ONE_TO_ONE, features=features)).tensors)
    source = view(rows)
    for number, members in enumerate(CLUSTERS.members):
        expected = source.outputs[0][list(members)].sum((0, 1)) / len(members)
        assert torch.allclose(merged.outputs[0][number].sum(0), expected, atol=1e-5)
    many_to_one = view(merge(model_type, rows, recipe_of(Merge.FIX_DOM, features=features)).tensors)
    assert not torch.allclose(many_to_one.outputs[0].sum(1), merged.outputs[0].sum(1), atol=1e-3)


@pytest.mark.parametrize("merge_name", NEURON_MERGES)
def test_what_belongs_to_no_neuron_is_averaged_plainly(merge_name: Merge) -> None:
    rows = source_rows("gpt_oss")
    merged = merge("gpt_oss", rows, recipe_of(merge_name))
    for number, members in enumerate(CLUSTERS.members):
        expected = rows["down_proj_bias"][list(members)].mean(0)
        assert torch.allclose(merged.tensors["down_proj_bias"][number], expected, atol=1e-6)


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_clusters_that_no_token_reached_are_named_where_activations_were_asked_for(recipe: Recipe) -> None:
    rows = source_rows("mixtral")
    sample = sample_of(tiny_experts("mixtral"))
    # Cluster 1 is experts 1 and 4; cluster 2 is alone and needs no activations.
    index_TK = torch.where(torch.isin(sample.index_TK, torch.tensor([1, 4, 3])), -1, sample.index_TK)
    merged = merge("mixtral", rows, recipe, sample=replace(sample, index_TK=index_TK))
    needs_routed_tokens = recipe.merge in NEURON_MERGES and recipe.features is not Features.WEIGHT
    assert merged.unseen == ((1,) if needs_routed_tokens else ())
    if needs_routed_tokens:
        by_weight = merge("mixtral", rows, replace(recipe, features=Features.WEIGHT), sample=sample)
        for name, tensor in merged.tensors.items():
            assert torch.equal(tensor[1], by_weight.tensors[name][1])


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_dropped_experts_take_part_in_nothing(recipe: Recipe) -> None:
    rows = source_rows("mixtral")
    broken = {name: tensor.clone() for name, tensor in rows.items()}
    for tensor in broken.values():
        tensor[[0, 5]] = torch.nan
    clusters = Clusters.of([-1, 0, 1, 0, 1, -1])
    expected = merge("mixtral", rows, recipe, clusters, (1, 4))
    found = merge("mixtral", broken, recipe, clusters, (1, 4))
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, expected.tensors[name])


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_aligned_copies_compute_what_the_original_computes(model_type: str) -> None:
    module = shuffled_copies(model_type)
    tokens_TH = sample_of(module).tokens_TH[:5]
    expected = outputs_of(module, tokens_TH)
    merged = merge(model_type, rows_of(module), recipe_of(Merge.AVERAGE, align=Align.WEIGHT))
    load_rows(module, {name: tensor[list(CLUSTERS.labels)] for name, tensor in merged.tensors.items()})
    assert torch.allclose(outputs_of(module, tokens_TH), expected, rtol=1e-4, atol=1e-6)
