"""Presets: methods by their names, and which of them a choice begins with."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build, options, read_config, token_ids

from hcsmoe_hub import ConvertOptions, convert
from hcsmoe_hub.cli.method_options import MethodFlags
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.options import (
    Align,
    AlignTo,
    Budget,
    Clustering,
    Distance,
    Dominant,
    Features,
    KMeansStart,
    Layout,
    Linkage,
    Merge,
    Method,
    MethodOptions,
    Preset,
    Propagate,
    Refit,
    RouterPolicy,
    Saliency,
    Similarity,
)
from hcsmoe_hub.recipe.presets import DEFAULT_PRESET, PRESETS, complete, starting_point
from hcsmoe_hub.recipe.resolve import resolve

# What each method is, by its paper and by the words of the documentation.
EXPECTED: dict[Preset, dict[str, Any]] = {
    Preset.HC_REFIT: {
        "method": Method.MERGE,
        "clustering": Clustering.HIERARCHICAL,
        "linkage": Linkage.LOSS,
        "similarity": None,
        "distance": None,
        "dominant": Dominant.SALIENCY,
        "merge": Merge.NEURONS,
        "router": RouterPolicy.FIT,
        "refit": Refit.BLOCK,
        "propagate": Propagate.MERGED,
        "layout": Layout.REDUCED,
    },
    Preset.REAP: {"method": Method.PRUNE, "saliency": Saliency.REAP, "refit": Refit.NONE},
    Preset.HC_SMOE: {
        "method": Method.MERGE,
        "similarity": (Similarity.EXPERT_OUTPUT,),
        "clustering": Clustering.HIERARCHICAL,
        "linkage": Linkage.AVERAGE,
        "merge": Merge.FREQUENCY,
        "refit": Refit.NONE,
        "layout": Layout.REDUCED,
    },
    Preset.M_SMOE: {
        "method": Method.MERGE,
        "similarity": (Similarity.ROUTER_LOGITS,),
        "clustering": Clustering.SINGLE_SHOT,
        "dominant": Dominant.FREQUENCY,
        "budget": Budget.M_SMOE,
        "align": Align.WEIGHT,
        "align_to": AlignTo.FIRST,
        "merge": Merge.FREQUENCY,
        "layout": Layout.MAPPED,
    },
}
# Every option: values of the published method, values that go with the default, and values of pruning.
PUBLISHED: dict[str, list[Any]] = {
    "similarity": [(Similarity.WEIGHT,)],
    "distance": list(Distance),
    "clustering": [kind for kind in Clustering if kind is not Clustering.HIERARCHICAL],
    "linkage": [kind for kind in Linkage if kind is not Linkage.LOSS],
    "kmeans_start": list(KMeansStart),
    "budget": [Budget.FREQUENCY, Budget.M_SMOE],
    "merge": [kind for kind in Merge if kind is not Merge.NEURONS],
    "dominant_weights": [(2.0, 1.0)],
    "features": list(Features),
    "align": list(Align),
    "align_to": list(AlignTo),
    "router": [policy for policy in RouterPolicy if policy is not RouterPolicy.FIT],
    "layout": [Layout.MAPPED, Layout.FULL],
}
DEFAULT: dict[str, list[Any]] = {
    "method": [Method.MERGE],
    "clustering": [Clustering.HIERARCHICAL],
    "linkage": [Linkage.LOSS],
    "dominant": list(Dominant),
    "budget": [Budget.UNIFORM],
    "max_cluster_size": [3],
    "merge": [Merge.NEURONS],
    "protect": [((None, 1),)],
    "layers": [(0, 1)],
    "refit": list(Refit),
    "refit_passes": [2],
    "router": [RouterPolicy.FIT],
    "propagate": list(Propagate),
    "layout": [Layout.REDUCED],
    "seed": [7],
}
PRUNING: dict[str, list[Any]] = {"method": [Method.PRUNE], "saliency": list(Saliency)}


def values(choices: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, listed in choices.items() for value in listed]


# What presets are


@pytest.mark.parametrize("preset", Preset)
def test_a_preset_is_the_method_of_its_name(preset: Preset) -> None:
    recipe = resolve(MethodOptions(preset=preset))
    assert {name: getattr(recipe, name) for name in EXPECTED[preset]} == EXPECTED[preset]


def test_every_preset_is_another_recipe() -> None:
    assert PRESETS.keys() == set(Preset)
    assert len({resolve(chosen) for chosen in PRESETS.values()}) == len(Preset)


def test_what_is_given_wins_over_the_preset() -> None:
    recipe = resolve(MethodOptions(preset=Preset.M_SMOE, align=Align.NONE, max_cluster_size=4, seed=7))
    assert (recipe.align, recipe.max_cluster_size, recipe.seed) == (Align.NONE, 4, 7)
    assert (recipe.clustering, recipe.budget, recipe.layout) == (Clustering.SINGLE_SHOT, Budget.M_SMOE, Layout.MAPPED)


@pytest.mark.parametrize("preset", Preset)
@pytest.mark.parametrize(("name", "value"), values(PUBLISHED) + values(DEFAULT) + values(PRUNING), ids=str)
def test_a_choice_is_in_force_as_given_whatever_the_preset(preset: Preset, name: str, value: Any) -> None:
    chosen = complete(MethodOptions(preset=preset, **{name: value}))
    assert getattr(chosen, name) == value
    others = {field.name for field in fields(MethodOptions)} - {name, "preset"}
    assert {getattr(chosen, other) == getattr(PRESETS[preset], other) for other in others} == {True}


@pytest.mark.parametrize("preset", Preset)
def test_factors_bring_their_layout_and_one_number_of_experts(preset: Preset) -> None:
    chosen = complete(MethodOptions(preset=preset, compress="32,0.9"))
    assert (chosen.layout, chosen.budget) == (Layout.FACTORED, Budget.UNIFORM)
    others = {field.name for field in fields(MethodOptions)} - {"compress", "layout", "budget", "preset"}
    assert {getattr(chosen, other) == getattr(PRESETS[preset], other) for other in others} == {True}


def test_none_leaves_a_choice_to_the_preset() -> None:
    assert resolve(MethodOptions(saliency=None)) == resolve(PRESETS[DEFAULT_PRESET])
    assert resolve(MethodOptions(preset=Preset.REAP, refit=None)) == resolve(MethodOptions(preset=Preset.REAP))


@pytest.mark.parametrize("preset", Preset)
def test_completed_options_are_complete(preset: Preset) -> None:
    completed = complete(MethodOptions(preset=preset, seed=7))
    assert completed.preset is preset
    assert complete(completed) == completed


def test_an_option_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TypeError, match="linkages"):
        MethodOptions(linkages=Linkage.WARD)  # type: ignore[call-arg]


# Where choices begin


def test_every_option_and_every_value_of_the_lists_above_is_tried() -> None:
    lists = (PUBLISHED, DEFAULT, PRUNING)
    assert {name for listed in lists for name in listed} | {"preset", "compress"} == {
        field.name for field in fields(MethodOptions)
    }
    kinds = {"method": Method, "clustering": Clustering, "linkage": Linkage, "merge": Merge, "budget": Budget}
    for name, kind in {**kinds, "router": RouterPolicy, "layout": Layout}.items():
        # Without compressed experts, there is nothing to write in the factored layout.
        assert {value for listed in lists for value in listed.get(name, [])} == set(kind) - {Layout.FACTORED}


def test_nothing_given_begins_with_the_default() -> None:
    assert starting_point(MethodOptions()) is DEFAULT_PRESET is Preset.HC_REFIT


@pytest.mark.parametrize(("name", "value"), values(PUBLISHED), ids=str)
def test_a_choice_of_the_published_method_begins_with_it(name: str, value: Any) -> None:
    assert starting_point(MethodOptions(**{name: value})) is Preset.HC_SMOE
    assert complete(MethodOptions(**{name: value})) == complete(MethodOptions(preset=Preset.HC_SMOE, **{name: value}))


@pytest.mark.parametrize(("name", "value"), values(DEFAULT), ids=str)
def test_a_choice_that_goes_with_the_default_begins_with_it(name: str, value: Any) -> None:
    assert starting_point(MethodOptions(**{name: value})) is DEFAULT_PRESET
    recipe = resolve(MethodOptions(**{name: value}))
    assert (recipe.linkage, recipe.merge) == (Linkage.LOSS, Merge.NEURONS)


@pytest.mark.parametrize(("name", "value"), values(PRUNING), ids=str)
def test_a_choice_of_pruning_begins_with_reap_and_refits_nothing(name: str, value: Any) -> None:
    assert starting_point(MethodOptions(**{name: value})) is Preset.REAP
    recipe = resolve(MethodOptions(**{name: value}))
    assert (recipe.method, recipe.refit) == (Method.PRUNE, Refit.NONE)


def test_kept_experts_can_be_refitted() -> None:
    recipe = resolve(MethodOptions(method=Method.PRUNE, refit=Refit.BLOCK))
    assert (recipe.saliency, recipe.refit, recipe.router) == (Saliency.REAP, Refit.BLOCK, None)


@pytest.mark.parametrize(("name", "value"), values(DEFAULT), ids=str)
def test_one_choice_of_the_published_method_is_enough(name: str, value: Any) -> None:
    chosen = MethodOptions(**{name: value, "similarity": (Similarity.WEIGHT,)})
    assert starting_point(chosen) is Preset.HC_SMOE


def test_what_the_preset_alone_asks_for_gives_way_to_what_is_given() -> None:
    recipe = resolve(MethodOptions(preset=Preset.HC_REFIT, layout=Layout.MAPPED))
    assert (recipe.linkage, recipe.merge) == (Linkage.LOSS, Merge.NEURONS)
    assert (recipe.router, recipe.refit, recipe.propagate) == (None, None, None)


def test_the_former_name_of_the_default_is_answered_with_the_new_one() -> None:
    with pytest.raises(PlanError, match="hc-refit"):
        MethodOptions(preset="refit")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"), [("linkage", Linkage.WARD), ("layout", Layout.MAPPED), ("router", RouterPolicy.DOMINANT)]
)
def test_a_refusal_of_pruning_names_an_option_that_was_given(name: str, value: Any) -> None:
    with pytest.raises(PlanError) as caught:
        resolve(MethodOptions(method=Method.PRUNE, **{name: value}))
    assert f"`{name}" in caught.value.hint


# The default


def test_the_library_and_the_command_line_have_the_same_default(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    flags = MethodFlags().options(seed=MethodOptions().seed)
    assert flags == MethodOptions() == ConvertOptions(experts=4).method
    by_default = convert(source, options(source, 4, ids=token_ids(4, 16), method=MethodOptions()))
    assert by_default.method == resolve(PRESETS[DEFAULT_PRESET]).as_dict()


@pytest.mark.parametrize("preset", Preset)
def test_every_preset_converts(tmp_path: Path, preset: Preset) -> None:
    source = build(tmp_path / "model")
    chosen = MethodFlags(preset=preset).options(seed=42)
    report = convert(source, options(source, 4, method=chosen))
    assert report.method == resolve(PRESETS[preset]).as_dict()
    assert sum(layer.experts for layer in report.layers) == 4 * len(report.layers)
    assert (preset is Preset.HC_REFIT) is all(layer.refit is not None for layer in report.layers)
    experts = read_config(tmp_path / "result")["num_local_experts"]
    assert experts == (8 if preset is Preset.M_SMOE else 4)
