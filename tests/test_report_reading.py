"""Reading ``hcsmoe.json``: two schema versions, and one message that names the key of a damaged one."""

import json
from dataclasses import fields
from typing import Any

import pytest
from places import GOLDEN
from recovery_records import RECOVERY

from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.recipe.recipe import Recipe
from hcsmoe_hub.report import MethodRecord
from hcsmoe_hub.report.read import read_report


def document(name: str = "report") -> dict[str, Any]:
    """A stored report of a conversion from 8 to 4 experts in 4 layers."""
    content: dict[str, Any] = json.loads((GOLDEN / "cards" / f"{name}.json").read_text("utf-8"))
    return content


def test_a_report_is_read_as_it_was_written() -> None:
    content = document()
    assert read_report(json.dumps(content), label="hcsmoe.json").as_dict() == content


def test_a_report_records_every_choice_of_a_recipe() -> None:
    recorded = [name for name in MethodRecord.__annotations__ if name != "dtype"]
    assert recorded == [field.name for field in fields(Recipe)]


def test_version_1_is_read_in_the_words_of_version_2() -> None:
    content = document("report-refit")
    assert content["schema_version"] == 1
    report = read_report(json.dumps(content), label="hcsmoe.json")
    assert report.schema_version == 2
    assert report.method["refit"] == content["method"]["correct"] == "experts"
    for layer, old in zip(report.layers, content["layers"], strict=True):
        assert layer.refit is not None
        assert layer.refit.error_after == old["correction"]["error_after"]


def test_what_the_first_reports_did_not_record_is_derived_or_open() -> None:
    content = {**document(), "schema_version": 1}
    for layer in content["layers"]:
        for name in ("experts", "dead_experts", "routing_score", "measured_tokens", "tree", "refit"):
            del layer[name]
        layer["usage"][2] = 0
        layer["correction"] = {"is_kept": True, "error_before": 0.5, "error_after": 0.25}
    for name in ("method", "seed", "layout", "budget", "refit"):
        del content["method"][name]
    report = read_report(json.dumps(content), label="hcsmoe.json")
    layer = report.layers[0]
    assert (layer.experts, layer.dead_experts) == (4, [2])
    assert (layer.routing_score, layer.measured_tokens, layer.tree) == (None, None, None)
    assert layer.refit is not None
    assert (layer.refit.rounds, layer.refit.fitted_tokens, layer.refit.steps) == (None, None, 0)
    chosen = report.method
    assert (chosen["method"], chosen["layout"], chosen["seed"], chosen["refit"]) == ("merge", "reduced", 42, None)


def figures(**changes: Any) -> dict[str, Any]:
    """What a conversion cost, with some figures changed."""
    row = {"tokens": 100, "perplexity_before": 10.0, "perplexity_after": 12.0, "ratio": 1.2, "kl": 0.1}
    row |= {"top1_agreement": 0.9}
    return {
        "sequences": 2,
        "sequence_length": 51,
        "sha256": "0" * 64,
        "overall": row,
        "domains": {"code": {**row, **changes}},
    }


def test_what_a_conversion_cost_is_read_and_absent_in_early_reports() -> None:
    content = {**document(), "measured": figures()}
    report = read_report(json.dumps(content), label="hcsmoe.json")
    assert report.measured == content["measured"]
    del content["measured"], content["not_measured"]
    report = read_report(json.dumps(content), label="hcsmoe.json")
    assert (report.measured, report.not_measured) == (None, None)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"tokens": 0}, "measured.domains.code.tokens is 0, so nothing was measured"),
        ({"ratio": 1e301}, "measured.domains.code has a perplexity or a ratio that is not a positive number"),
        ({"perplexity_before": 0.0}, "measured.domains.code has a perplexity or a ratio that is not a positive number"),
        ({"top1_agreement": 1.5}, "measured.domains.code.top1_agreement is 1.5, not between 0 and 1"),
        ({"kl": None}, "measured.domains.code.kl is null, not a number"),
    ],
)
def test_impossible_figures_of_a_cost_are_refused(changes: dict[str, Any], problem: str) -> None:
    content = {**document(), "measured": figures(**changes)}
    with pytest.raises(SourceError) as caught:
        read_report(json.dumps(content), label="hcsmoe.json")
    assert problem in caught.value.message


def test_a_training_after_the_conversion_is_read_and_absent_without_one() -> None:
    content = {**document(), "recovery": RECOVERY}
    report = read_report(json.dumps(content), label="hcsmoe.json")
    assert report.recovery == RECOVERY
    assert report.as_dict()["recovery"] == RECOVERY
    without = read_report(json.dumps(document()), label="hcsmoe.json")
    assert without.recovery is None
    assert "recovery" not in without.as_dict()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kept_step": 600}, "recovery.kept_step is 600 of 512 steps"),
        ({"after": {"perplexity": -1.0, "kl": 0.1}}, "recovery.after has a figure that no training can have"),
        ({"before": {"perplexity": 2.0, "kl": 1e301}}, "recovery.before has a figure that no training can have"),
        ({"before": {"perplexity": 2.0}}, "recovery.before.kl is missing"),
        ({"settings": {**RECOVERY["settings"], "train": []}}, "recovery.settings.train is empty"),
        ({"data": {**RECOVERY["data"], "sequence_length": 0}}, "recovery.data.sequence_length is 0"),
        ({"steps": "many"}, 'recovery.steps is "many", not an integer'),
    ],
)
def test_impossible_trainings_are_refused(changes: dict[str, Any], problem: str) -> None:
    content = {**document(), "recovery": {**RECOVERY, **changes}}
    with pytest.raises(SourceError) as caught:
        read_report(json.dumps(content), label="hcsmoe.json")
    assert problem in caught.value.message


def test_a_key_of_a_later_program_is_left_out() -> None:
    content = document()
    content["layers"][0]["novelty"] = content["novelty"] = {"any": "thing"}
    assert read_report(json.dumps(content), label="hcsmoe.json").as_dict() == document()


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("layers", 3, "labels"), None, "layers[3].labels is null, not a list"),
        (("layers", 3, "labels", 1), "x", 'layers[3].labels[1] is "x", not an integer'),
        (("layers", 3, "labels", 1), 1.5, "layers[3].labels[1] is 1.5, not an integer"),
        (("layers", 0, "router", "top_k_agreement"), True, "layers[0].router.top_k_agreement is true, not a number"),
        (("experts", "after"), "4", 'experts.after is "4", not an integer'),
        (("source", "license"), 3, "source.license is 3, not text"),
        (("timings_seconds", "convert"), None, "timings_seconds.convert is null, not a number"),
        (("layers", 1, "experts"), 5, "layers[1].labels contradicts its usage or its number of experts"),
    ],
)
def test_a_damaged_report_is_one_message_that_names_the_key(path: Any, value: Any, problem: str) -> None:
    content: Any = document()
    place = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(SourceError) as caught:
        read_report(json.dumps(content), label="result/hcsmoe.json")
    assert caught.value.message == f"result/hcsmoe.json is damaged: {problem}."


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        (("layers", 3, "labels"), "layers[3].labels is missing"),
        (("calibration", "sha256"), "calibration.sha256 is missing"),
        (("method", "merge"), "method.merge is missing"),
        (("schema_version",), "schema_version is missing"),
    ],
)
def test_a_missing_key_is_named(path: Any, problem: str) -> None:
    content: Any = document()
    place = content
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    with pytest.raises(SourceError, match=r"is damaged") as caught:
        read_report(json.dumps(content), label="hcsmoe.json")
    assert problem in caught.value.message


def test_a_newer_version_asks_for_a_newer_program() -> None:
    with pytest.raises(SourceError, match="schema version 3") as caught:
        read_report(json.dumps(document() | {"schema_version": 3}), label="hcsmoe.json")
    assert caught.value.hint == "use a newer hcsmoe"
