"""``--size``, ``--parameters``, ``--active``, ``--ratio``: what a dry run shows, and one message for what is wrong."""

import shlex

import pytest


@pytest.fixture
def aiming(example):
    """Words of a conversion without a number of experts."""
    return shlex.split(f"convert {shlex.quote(str(example))} --preset hc-smoe --samples 2 --sequence-length 64")


def test_a_dry_run_lists_what_meets_the_target_and_leaves_the_choice_open(run, aiming):
    document = run(*aiming, "--ratio", "0.5", "--dry-run", "--json").document()
    target = document["target"]
    assert (target["limit"], target["value"], target["chosen"]) == ("ratio", 0.5, None)
    assert not document["is_final"]
    assert [(found["experts"], found["width"]) for found in target["candidates"]] == [
        (8, 96),
        (6, 128),
        (5, 144),
        (4, 192),
    ]
    assert {found["predicted_error"] for found in target["candidates"]} == {None}
    shown = run(*aiming, "--ratio", "0.5", "--dry-run").stdout
    assert "meet --ratio 0.5" in shown
    assert "one pass over the model predicts" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ratio 0.5 --experts 4", "both are given"),
        ("", "neither is given"),
        ("--ratio 0.5 --size 4MB", "--size and --ratio are given"),
        ("--size 4GB", "already, not more than the 4.0 GB of weights of --size"),
        ("--size 1MB", "the smallest one, 2 experts of 16 neurons, has"),
    ],
)
def test_one_message_in_words_of_the_command_line_says_what_is_wrong(run, aiming, words, message):
    result = run(*aiming, *words.split(), "--dry-run")
    assert result.code == 1
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize("words", ["--ratio 1.5", "--ratio half", "--size 4", "--parameters many"])
def test_a_value_that_is_not_a_limit_is_a_usage_error(run, aiming, words):
    assert run(*aiming, *words.split(), "--dry-run").code == 2
