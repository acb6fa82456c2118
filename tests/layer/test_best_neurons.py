"""Conversions that cluster by loss and merge the best neurons: what is kept, what is scaled, what fits a model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import save_tiny
from tiny_models import build, change_tensors, options, read_tensors, token_ids
from torch import Tensor

from hcsmoe_hub import convert, plan
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.options import (
    Clustering,
    Dominant,
    Layout,
    Linkage,
    Merge,
    MethodOptions,
    Preset,
    Propagate,
    Refit,
    RouterPolicy,
)
from hcsmoe_hub.recipe.resolve import resolve
from hcsmoe_hub.report import ConversionReport

IDS = token_ids(8, 32)
LOSS = {"preset": Preset.HC_REFIT, "refit": Refit.NONE, "propagate": Propagate.ORIGINAL}


def converted(source: Path, experts: int = 4, more: Any = None, **choices: Any) -> ConversionReport:
    method = MethodOptions(**{**LOSS, **choices})
    return convert(source, options(source, experts, ids=IDS, method=method, overwrite=True, **(more or {})))


def experts_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in read_tensors(folder).items() if ".experts." in name}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build(tmp_path / "model")


def test_every_layer_is_clustered_and_says_what_each_merge_lost(source: Path) -> None:
    report = converted(source)
    assert (report.method["linkage"], report.method["merge"]) == ("loss", "neurons")
    for layer in report.layers:
        assert len(layer.dominant) == 4
        assert len(layer.merge_heights) == 4
        assert 0 < sum(layer.merge_heights) < 1
        assert layer.tree is not None
        assert len(layer.tree) == 7
        assert layer.silhouette is not None


def test_as_many_clusters_as_experts_is_the_identity(source: Path) -> None:
    report = converted(source, 8, refit=Refit.BLOCK, propagate=Propagate.MERGED)
    before, after = read_tensors(source), read_tensors(source.parent / "result")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all((layer.output_error, layer.refit, layer.merge_heights) == (0, None, []) for layer in report.layers)


def shuffle_copies(tensors: dict[str, Tensor]) -> None:
    """Makes every expert of a layer the first one, its neurons in another order."""
    for layer in range(2):
        name = f"model.layers.{layer}.block_sparse_moe.experts.{{}}.{{}}.weight"
        for expert in range(1, 8):
            order = torch.randperm(48, generator=torch.Generator().manual_seed(expert))
            tensors[name.format(expert, "w1")] = tensors[name.format(0, "w1")][order]
            tensors[name.format(expert, "w3")] = tensors[name.format(0, "w3")][order]
            tensors[name.format(expert, "w2")] = tensors[name.format(0, "w2")][:, order]


@pytest.mark.parametrize("experts", [2, 5])
def test_copies_in_other_orders_merge_without_loss_and_give_what_the_source_gave(source: Path, experts: int) -> None:
    change_tensors(source, shuffle_copies)
    for layer in converted(source, experts).layers:
        assert set(layer.merge_heights) == {0.0}
        assert layer.output_error < 1e-5


def test_experts_that_stay_alone_keep_their_bits_where_nothing_scales_them(source: Path) -> None:
    report = converted(source, 6, layout=Layout.FULL, refit=None, propagate=None)
    before, after = experts_of(source), experts_of(source.parent / "result")
    alone = {(layer.layer, members[0]) for layer in report.layers for members in layer.members() if len(members) == 1}
    same = [name.split(".") for name in before if torch.equal(before[name], after[name])]
    kept = {(int(words[2]), int(words[5])) for words in same}
    assert kept == alone != set()


def test_experts_are_scaled_to_the_weights_of_the_reduced_router_where_that_helps(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = converted(source)
    monkeypatch.setattr("hcsmoe_hub.layer.reducer.scale_outputs", lambda *args, **kwargs: False)
    plain = converted(source)
    pairs = list(zip(scaled.layers, plain.layers, strict=True))
    assert all(new.labels == old.labels for new, old in pairs)
    assert all(new.output_error <= old.output_error * 1.001 for new, old in pairs)
    assert any(new.output_error < old.output_error for new, old in pairs)


@pytest.mark.parametrize("clustering", [kind for kind in Clustering if kind is not Clustering.FUZZY])
def test_best_neurons_can_be_taken_of_any_clusters(source: Path, clustering: Clustering) -> None:
    choices = {"preset": Preset.HC_SMOE, "merge": Merge.NEURONS, "propagate": None}
    report = converted(source, clustering=clustering, **choices)
    assert all(0 < layer.output_error < 1 for layer in report.layers)


@pytest.mark.parametrize("merge", [Merge.FREQUENCY, Merge.ZIPIT, Merge.FIX_DOM])
def test_clusters_of_the_loss_linkage_can_be_merged_in_any_way(source: Path, merge: Merge) -> None:
    expected = converted(source)
    report = converted(source, preset=Preset.HC_SMOE, linkage=Linkage.LOSS, merge=merge, refit=None, propagate=None)
    assert [layer.labels for layer in report.layers] == [layer.labels for layer in expected.layers]


@pytest.mark.parametrize("router", [policy for policy in RouterPolicy if policy is not RouterPolicy.MEMBERSHIP])
def test_any_router_goes_with_best_neurons(source: Path, router: RouterPolicy) -> None:
    report = converted(source, router=router, propagate=None)
    assert {layer.router.policy for layer in report.layers} == {router.value}


def test_the_same_conversion_gives_the_same_bytes(source: Path) -> None:
    converted(source)
    first = read_tensors(source.parent / "result")
    converted(source)
    second = read_tensors(source.parent / "result")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_statistics_file_gives_the_same_clusters(source: Path) -> None:
    file = source.parent / "statistics"
    written = converted(source, more={"statistics": file})
    read = converted(source, more={"statistics": file})
    assert read.layers == written.layers


def test_protected_experts_stay_alone(source: Path) -> None:
    for layer in converted(source, protect=((None, 3),), dominant=Dominant.CENTER).layers:
        assert (3,) in [tuple(members) for members in layer.members()]
        assert layer.tree is None


# What a model does not allow


def planned(source: Path, **choices: Any) -> Any:
    method = MethodOptions(**choices)
    return plan(source, options(source, 3, ids=IDS, method=method, output=source.parent / "planned"))


def test_the_default_is_planned_in_full_where_nothing_stands_against_it(source: Path) -> None:
    found = planned(source)
    assert (found.recipe.refit, found.recipe.router, found.recipe.propagate) == ("block", "fit", "merged")
    assert [text for text in found.warnings if "hc-refit" in text] == []


def test_the_default_is_planned_in_full_where_a_decoder_layer_is_the_block_itself(tmp_path: Path) -> None:
    save_tiny("gemma4_text", tmp_path / "model")
    found = planned(tmp_path / "model")
    assert (found.recipe.refit, found.recipe.router, found.recipe.propagate) == ("block", "fit", "merged")
    assert [text for text in found.warnings if "hc-refit" in text] == []


def test_the_default_is_planned_in_full_with_a_statistics_file(source: Path) -> None:
    chosen = options(source, 4, ids=IDS, method=MethodOptions(), statistics=source.parent / "statistics")
    found = plan(source, chosen)
    assert (found.recipe.refit, found.recipe.router, found.recipe.propagate) == ("block", "fit", "merged")
    assert [text for text in found.warnings if "hc-refit" in text] == []


@pytest.mark.parametrize("choice", [{"similarity": ("weight",)}, {"distance": "cosine"}])
def test_the_loss_linkage_has_no_similarity_and_no_distance(choice: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="would have no effect: the loss linkage") as caught:
        resolve(MethodOptions(linkage=Linkage.LOSS, **choice))
    (name,) = choice
    assert caught.value.hint == f"leave `{name}` out"
