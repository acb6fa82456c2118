"""Conversions that apply the choices of another one: what is taken, and what is computed anew."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from sisters import IDS, alike, choices, made, neurons, perturb
from tiny_models import build, change_tensors, differing, options, read_tensors
from torch import Tensor

from hcsmoe_hub import convert, plan
from hcsmoe_hub.options import ConvertOptions, MethodOptions
from hcsmoe_hub.report import NEURONS_FILE, REPORT_FILE, ConversionReport
from hcsmoe_hub.report.read import read_report

METHODS: dict[str, dict[str, Any]] = {
    "reap": {"preset": "reap"},
    "reap, fitted": {"preset": "reap", "refit": "down", "router": "fit"},
    "hc-smoe": {"preset": "hc-smoe"},
    "hc-refit": {"preset": "hc-refit"},
    "m-smoe": {"preset": "m-smoe"},
    "copies": {"preset": "hc-smoe", "linkage": "loss", "merge": "neurons", "layout": "full", "budget": "frequency"},
    "zipit": {"preset": "hc-smoe", "merge": "zipit"},
    "random": {"preset": "hc-smoe", "clustering": "random", "merge": "neurons"},
    "narrower": {"preset": "hc-refit"},
    "narrower, all experts": {"preset": "hc-refit", "refit": "none"},
    "narrower, pruned": {"preset": "reap"},
    "narrower, averaged": {"preset": "hc-smoe", "align": "weight"},
    "narrower, in the order of the first": {"preset": "hc-smoe", "align": "weight", "align_to": "first"},
}
SIZES: dict[str, dict[str, Any]] = {
    "narrower": {"experts": 5, "expert_width": 32},
    "narrower, all experts": {"expert_width": 32},
    "narrower, pruned": {"experts": 5, "expert_width": "75%"},
    "narrower, averaged": {"experts": 5, "expert_width": 16},
    "narrower, in the order of the first": {"experts": 3, "expert_width": 16},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral: 2 layers, 8 experts."""
    return build(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def sister(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after some training."""
    folder = build(tmp_path_factory.mktemp("sister") / "sister")
    change_tensors(folder, perturb)
    return folder


@pytest.fixture(scope="module")
def result(base: Path) -> Path:
    """The base model converted as it is by default."""
    made(base, base.parent / "result", {})
    return base.parent / "result"


# What is taken


@pytest.fixture(scope="module", params=METHODS)
def first(request: pytest.FixtureRequest, base: Path) -> tuple[ConversionReport, Path]:
    """The base model converted by one of the methods."""
    name, folder = request.param, base.parent / "first" / request.param
    return made(base, folder, METHODS[name], SIZES.get(name)), folder


def test_a_sister_gets_the_experts_and_the_neurons_of_the_other_result(
    first: tuple[ConversionReport, Path], sister: Path, tmp_path: Path
) -> None:
    report, folder = first
    second = convert(sister, alike(sister, tmp_path / "second", folder))
    assert choices(second) == choices(report)
    assert (second.method, second.experts) == (report.method, report.experts)
    is_listed = report.method["merge"] == "neurons" or "width_after" in report.experts
    assert (folder / NEURONS_FILE).exists() is is_listed
    assert not is_listed or neurons(tmp_path / "second") == neurons(folder)
    assert differing(read_tensors(tmp_path / "second"), read_tensors(folder))


def test_the_same_source_text_and_options_give_the_same_bytes(
    first: tuple[ConversionReport, Path], base: Path, tmp_path: Path
) -> None:
    report, folder = first
    second = convert(base, alike(base, tmp_path / "second", folder, ids=IDS))
    assert differing(read_tensors(folder), read_tensors(tmp_path / "second")) == []
    assert (folder / "config.json").read_bytes() == (tmp_path / "second" / "config.json").read_bytes()
    assert second.neurons == report.neurons
    assert [layer.refit for layer in second.layers] == [layer.refit for layer in report.layers]


def test_on_its_own_the_sister_is_converted_otherwise(result: Path, sister: Path, tmp_path: Path) -> None:
    own = made(sister, tmp_path / "own", {"refit": "none"})
    assert choices(own) != choices(read_report((result / REPORT_FILE).read_text(), label="result"))
    assert neurons(tmp_path / "own") != neurons(result)


@pytest.mark.parametrize("given", [{"refit": "none"}, {"refit": "down"}, {"router": "average"}, {"refit_passes": 2}])
def test_what_follows_the_choices_may_be_asked_for(
    result: Path, sister: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    method = MethodOptions(**given, propagate="original" if given == {"router": "average"} else None)
    found = plan(sister, alike(sister, tmp_path / "made", result, method=method)).recipe
    assert {name: getattr(found, name) for name in given} == given
    assert (found.linkage, found.merge) == ("loss", "neurons")


def test_what_is_not_asked_for_is_as_in_the_other_result(base: Path, sister: Path, tmp_path: Path) -> None:
    method = {"preset": "reap", "refit": "block", "refit_passes": 3, "router": "fit", "propagate": "merged"}
    first = made(base, tmp_path / "first", method)
    found = plan(sister, alike(sister, tmp_path / "made", tmp_path / "first"))
    assert found.method == first.method
    # Without a refit, passes over the text are not a choice any more.
    fewer = plan(sister, alike(sister, tmp_path / "made", tmp_path / "first", method=MethodOptions(refit="none")))
    assert (fewer.recipe.refit_passes, fewer.recipe.propagate, fewer.recipe.router) == (None, "merged", "fit")


def test_a_choice_that_is_the_same_may_be_repeated(result: Path, sister: Path, tmp_path: Path) -> None:
    same = alike(sister, tmp_path / "made", result, experts=5, method=MethodOptions(linkage="loss", merge="neurons"))
    assert plan(sister, same).experts_by_layer == {0: 5, 1: 5}


def test_active_experts_are_those_of_the_other_result_unless_given(base: Path, sister: Path, tmp_path: Path) -> None:
    method = MethodOptions(preset="reap")
    convert(base, options(base, 5, ids=IDS, output=tmp_path / "first", experts_per_token=1, method=method))
    counts = [
        plan(sister, alike(sister, tmp_path / "made", tmp_path / "first", experts_per_token=given)).settings
        for given in (None, 2)
    ]
    assert [found.experts_per_token for found in counts] == [1, 2]


def test_nothing_is_compared_when_nothing_is_chosen(base: Path, sister: Path, tmp_path: Path) -> None:
    made(base, tmp_path / "first", {"preset": "hc-smoe"})
    report = convert(sister, alike(sister, tmp_path / "second", tmp_path / "first", figure=True))
    assert {(layer.tree, layer.silhouette, layer.dunn) for layer in report.layers} == {(None, None, None)}
    assert {tuple(layer.merge_heights) for layer in report.layers} == {()}
    assert (tmp_path / "second" / "hcsmoe.png").exists()


def test_the_report_says_whose_choices_were_applied(result: Path, sister: Path, tmp_path: Path) -> None:
    digest = sha256((result / REPORT_FILE).read_bytes()).hexdigest()
    record = {"path": "result", "revision": None, "sha256": digest, "neurons": True}
    report = convert(sister, alike(sister, tmp_path / "made", result / REPORT_FILE))
    assert report.like == record
    assert json.loads((tmp_path / "made" / REPORT_FILE).read_text())["like"] == record
    assert "like" not in json.loads((result / REPORT_FILE).read_text())


def test_statistics_of_the_sister_serve_as_well(base: Path, sister: Path, tmp_path: Path) -> None:
    first = made(base, tmp_path / "first", {"preset": "hc-smoe"})
    for output in ("written", "read"):
        chosen = alike(sister, tmp_path / output, tmp_path / "first", statistics=tmp_path / "statistics")
        if output == "read":
            chosen = ConvertOptions(like=chosen.like, output=chosen.output, statistics=chosen.statistics)
        assert choices(convert(sister, chosen)) == choices(first)


def test_neurons_are_taken_of_an_expert_that_is_a_copy_in_the_sister_alone(base: Path, tmp_path: Path) -> None:
    first = made(base, tmp_path / "first", {"preset": "hc-refit", "refit": "none"}, {"experts": 2})
    source = build(tmp_path / "copies")
    # Two experts that become one.
    one, *_, other = max(first.layers[0].members(), key=len)

    def copy(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.block_sparse_moe.experts.{}.{}.weight"
        for matrix, dim in (("w1", 0), ("w3", 0), ("w2", 1)):
            tensors[name.format(other, matrix)] = tensors[name.format(one, matrix)].flip(dim)

    change_tensors(source, copy)
    convert(source, alike(source, tmp_path / "second", tmp_path / "first", ids=IDS))
    assert neurons(tmp_path / "second") == neurons(tmp_path / "first")
