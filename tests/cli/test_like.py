"""``hcsmoe convert --like``: what a person sees of a plan, and the messages in the words of the command line."""

import json

import pytest


@pytest.fixture(scope="module")
def result(run, example, tmp_path_factory):
    """Report and config of the example pruned to 5 experts."""
    folder = tmp_path_factory.mktemp("like") / "small"
    words = ("--experts", "5", "--preset", "reap", "--samples", "1", "--sequence-length", "64", "--no-measure")
    assert run("convert", example, *words, "--output", folder).code == 0
    return folder


def test_a_plan_shows_whose_choices_it_applies(run, example, result, tmp_path):
    words = ("convert", example, "--like", result, "--output", tmp_path / "made", "--dry-run")
    finished = run(*words)
    assert finished.code == 0
    assert f"experts of {result}" in " ".join(finished.stdout.split())
    document = run(*words, "--json").document()
    assert (document["like"]["path"], document["like"]["neurons"]) == ("small", False)
    assert document["experts"]["after"] == 5
    assert document["method"] == json.loads((result / "hcsmoe.json").read_text())["method"]


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (("--experts", "4"), "--experts 4 was given, but", "leave --experts out, or --like"),
        (
            ("--saliency", "frequency"),
            "--saliency frequency contradicts the choices of",
            "leave --saliency out, or --like",
        ),
        (
            ("--preset", "reap"),
            "--preset reap names a method, but --like takes that of",
            "leave --preset out, or --like",
        ),
    ],
)
def test_an_option_that_contradicts_a_choice_is_refused(run, example, result, words, message, hint):
    finished = run("convert", example, "--like", result, *words, "--dry-run")
    printed = " ".join(finished.stderr.split())
    assert finished.code == 1
    assert message in printed
    assert hint in printed


def test_a_count_a_width_or_another_result_is_needed(run, example):
    finished = run("convert", example, "--dry-run")
    assert finished.code != 0
    assert "--like" in finished.stderr
