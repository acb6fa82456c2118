"""What was typed wrongly ends with exit code 2, the known values, and a suggestion."""

import pytest


def usage_error(run, *words):
    """Text of a usage error without the frame around it."""
    result = run(*words)
    assert result.code == 2
    assert result.stdout == ""
    return " ".join(result.stderr.replace("│", " ").split())


def test_misspelt_command_is_answered_with_the_right_one(run):
    assert "Did you mean 'convert'?" in usage_error(run, "conver", "model")


def test_misspelt_option_is_answered_with_the_right_one(run):
    assert "--experts" in usage_error(run, "convert", "model", "--exprts", "4")


def test_experts_are_required(run):
    assert "Missing option '--experts'" in usage_error(run, "convert", "model")


@pytest.mark.parametrize(
    ("option", "word", "meant", "known"),
    [
        ("--similarity", "expert-outputs", "expert-output", "expert-output"),
        ("--distance", "euclidian", "euclidean", "euclidean, cosine"),
        ("--clustering", "hirarchical", "hierarchical", "hierarchical"),
        ("--linkage", "Average", "average", "average, single, complete, ward"),
        ("--merge", "freqency", "frequency", "frequency, average"),
        ("--router", "dominat", "dominant", "dominant, frequency, average"),
        ("--layout", "reduce", "reduced", "reduced"),
        ("--device", "cud", "cuda", "auto, cpu, cuda, cuda:N"),
        ("--device", "GPU", "cuda", "auto, cpu, cuda, cuda:N"),
        ("--device", "cuda:first", "cuda:N", "auto, cpu, cuda, cuda:N"),
    ],
)
def test_unknown_value_is_answered_with_a_suggestion_and_the_known_ones(run, option, word, meant, known):
    error = usage_error(run, "convert", "model", "--experts", "4", option, word)
    assert f"Invalid value for '{option}': '{word}' is unknown; did you mean '{meant}'?" in error
    assert f"Known values: {known}." in error


def test_unknown_value_without_a_near_one_is_answered_with_the_known_ones(run):
    error = usage_error(run, "convert", "model", "--experts", "4", "--distance", "manhattan")
    assert "'manhattan' is unknown. Known values: euclidean, cosine." in error


@pytest.mark.parametrize("option", ["--max-memory", "--max-shard-size"])
@pytest.mark.parametrize("size", ["5 apples", "5", "GB", "-5GB", "0GB", "5GiB", "1e3GB"])
def test_bad_size_is_one_message(run, option, size):
    error = usage_error(run, "convert", "model", "--experts", "4", f"{option}={size}")
    assert f"'{size}' is no size; write a number and KB, MB, GB, TB, such as 5GB." in error


@pytest.mark.parametrize(
    "option", ["--experts", "--experts-per-token", "--samples", "--sequence-length", "--batch-tokens"]
)
@pytest.mark.parametrize("number", ["0", "-1", "many", "1.5"])
def test_number_below_one_is_refused(run, option, number):
    assert option in usage_error(run, "convert", "model", "--experts", "4", f"{option}={number}")


def test_json_and_quiet_exclude_each_other(run):
    error = usage_error(run, "convert", "model", "--experts", "4", "--json", "--quiet")
    assert "--quiet" in error
    assert "--json" in error
