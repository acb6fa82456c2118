"""Words become members of the enums where they enter, and an unknown one is refused with the nearest."""

from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build, contents, options, token_ids

from hcsmoe_hub import (
    Clustering,
    ConvertOptions,
    Dominant,
    KMeansStart,
    Layout,
    Linkage,
    Merge,
    Method,
    MethodOptions,
    PlanError,
    Preset,
    Similarity,
    convert,
)
from hcsmoe_hub.cli.method_options import MethodFlags

BOTH = (Similarity.WEIGHT, Similarity.ROUTER_LOGITS)


def refused(**given: Any) -> PlanError:
    """The refusal of some choices, before anything is planned."""
    with pytest.raises(PlanError) as caught:
        MethodOptions(**given)
    return caught.value


@pytest.mark.parametrize(
    ("name", "word", "member"),
    [
        ("preset", "hc-smoe", Preset.HC_SMOE),
        ("method", "prune", Method.PRUNE),
        ("layout", "mapped", Layout.MAPPED),
        ("clustering", "kmeans", Clustering.KMEANS),
        ("kmeans_start", "k-means++", KMeansStart.PLUS_PLUS),
        ("linkage", "ward", Linkage.WARD),
    ],
)
def test_a_word_is_the_member_that_it_names(name: str, word: str, member: StrEnum) -> None:
    assert getattr(MethodOptions(**{name: word}), name) is member
    assert MethodOptions(**{name: word}) == MethodOptions(**{name: member})


@pytest.mark.parametrize(
    ("given", "similarity"),
    [
        ("weight", (Similarity.WEIGHT,)),
        (Similarity.WEIGHT, (Similarity.WEIGHT,)),
        (["weight"], (Similarity.WEIGHT,)),
        ("weight+router-logits", BOTH),
        (" weight + router-logits ", BOTH),
        (["weight", Similarity.ROUTER_LOGITS], BOTH),
        (("weight", "router-logits"), BOTH),
    ],
)
def test_a_similarity_is_a_word_or_several(given: Any, similarity: tuple[Similarity, ...]) -> None:
    assert MethodOptions(similarity=given).similarity == similarity


@pytest.mark.parametrize(
    ("name", "word", "answer"),
    [
        ("linkage", "hirarchical", "'hirarchical' is unknown. Known values: average, single, complete, ward, loss."),
        ("clustering", "hirarchical", "'hirarchical' is unknown; did you mean 'hierarchical'? Known values: hier"),
        ("method", "prun", "'prun' is unknown; did you mean 'prune'? Known values: merge, prune."),
        ("method", "PRUNE", "did you mean 'prune'?"),
        ("similarity", "weight+eo", "'eo' is unknown; did you mean 'expert-output'?"),
        ("similarity", ["weights"], "'weights' is unknown; did you mean 'weight'?"),
        ("merge", "weighted", "did you mean 'average' or 'dominant'?"),
        ("preset", "hcsmoe", "did you mean 'hc-smoe'?"),
    ],
)
def test_an_unknown_word_is_refused_with_the_known_ones_and_the_nearest(name: str, word: Any, answer: str) -> None:
    error = refused(**{name: word})
    assert error.message.startswith(f"`{name}`: ")
    assert answer in error.message
    assert error.option == name
    assert error.hint == f"correct the value of `{name}`"


@pytest.mark.parametrize(
    ("name", "value", "answer"),
    [
        ("method", 1, "1 is not a word."),
        ("method", True, "True is not a word."),
        ("similarity", 3, "3 is not a list or a tuple."),
        ("similarity", {"weight": 1}, "{'weight': 1} is not a list or a tuple."),
        ("max_cluster_size", 0, "0 is too small; the lowest value is 1."),
        ("max_cluster_size", "3", "'3' is not a whole number."),
        ("max_cluster_size", True, "True is not a whole number."),
        ("max_cluster_size", 3.0, "3.0 is not a whole number."),
        ("seed", -1, "-1 is too small; the lowest value is 0."),
        ("seed", None, "None is not a whole number."),
        ("layers", (0, -1), "-1 is too small; the lowest value is 0."),
        ("layers", "0-3", "'0-3' is not a list or a tuple."),
        ("protect", [(0, 1, 2)], "(0, 1, 2) does not hold 2 values."),
        ("protect", [(0, None)], "None is not a whole number."),
        ("dominant_weights", (2.0, float("nan")), "nan is not a finite number."),
        ("dominant_weights", (float("inf"), 1), "inf is not a finite number."),
        ("dominant_weights", ("2", 1), "'2' is not a finite number."),
        ("dominant_weights", (2, True), "True is not a finite number."),
        ("dominant_weights", (2, 1, 1), "(2, 1, 1) does not hold 2 values."),
    ],
)
def test_a_value_of_another_kind_is_refused(name: str, value: Any, answer: str) -> None:
    error = refused(**{name: value})
    assert (error.message, error.option) == (f"`{name}`: {answer}", name)


def test_lists_become_tuples() -> None:
    found = MethodOptions(layers=[0, 2], protect=[[None, 3], (1, 2)], dominant_weights=[2, 1])  # type: ignore[arg-type]
    assert (found.layers, found.protect, found.dominant_weights) == ((0, 2), ((None, 3), (1, 2)), (2.0, 1.0))
    assert all(type(weight) is float for weight in found.dominant_weights or ())


def test_the_old_word_for_the_frequency_of_an_expert_is_understood() -> None:
    assert MethodOptions(dominant="usage").dominant is Dominant.FREQUENCY  # type: ignore[arg-type]
    assert Merge.FREQUENCY.value == Dominant.FREQUENCY.value == "frequency"


def test_the_hint_of_a_refusal_stands_below_its_message() -> None:
    assert refused(method="prun").__notes__ == ["Hint: correct the value of `method`"]


# What comes of words


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({"method": "prune"}, {"method": Method.PRUNE}),
        ({"layout": "mapped"}, {"layout": Layout.MAPPED}),
        ({"clustering": "kmeans"}, {"clustering": Clustering.KMEANS}),
        ({"linkage": "ward"}, {"linkage": Linkage.WARD}),
        ({"preset": "reap"}, {"preset": Preset.REAP}),
        ({"similarity": "weight", "layout": "reduced"}, {"similarity": (Similarity.WEIGHT,)}),
    ],
)
def test_words_give_the_bytes_of_the_command_line(tmp_path: Path, given: dict[str, Any], flags: dict[str, Any]) -> None:
    source, ids = build(tmp_path / "model"), token_ids(4, 16)
    reports = {
        name: convert(source, options(source, 4, ids=ids, method=method, output=tmp_path / name))
        for name, method in (("words", MethodOptions(**given)), ("flags", MethodFlags(**flags).options(seed=42)))
    }
    assert reports["words"].method == reports["flags"].method
    found, expected = (contents(tmp_path / name) for name in reports)
    assert [
        name for name in expected if name not in ("hcsmoe.json", "README.md") and found[name] != expected[name]
    ] == []
    assert found.keys() == expected.keys()


def test_no_method_and_options_that_name_nothing_are_the_same() -> None:
    assert ConvertOptions(experts=4) == ConvertOptions(experts=4, method=MethodOptions())
