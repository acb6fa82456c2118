"""What was typed wrongly ends with exit code 2, the known values, and a suggestion."""

import pytest

from hcsmoe_hub.options import Clustering, Layout, Merge, Similarity


def usage_error(run, *words):
    """Text of a usage error without the frame around it."""
    result = run(*words)
    assert result.code == 2
    assert result.stdout == ""
    return " ".join(result.stderr.replace("│", " ").split())


def test_misspelt_command_is_answered_with_the_right_one(run):
    assert "Did you mean 'convert'" in usage_error(run, "conver", "model")


def test_misspelt_option_is_answered_with_the_right_one(run):
    assert "--experts" in usage_error(run, "convert", "model", "--exprts", "4")


def test_a_number_a_width_or_a_target_is_required(run):
    result = run("convert", "model")
    assert result.code == 1
    assert "Hint: give --experts, --expert-width, or both; or one target; or --like" in result.stderr


@pytest.mark.parametrize(
    ("option", "word", "meant", "known"),
    [
        ("--similarity", "expert-outputs", "expert-output", ", ".join(Similarity)),
        ("--distance", "euclidian", "euclidean", "euclidean, cosine, kl-divergence, wasserstein"),
        ("--clustering", "hirarchical", "hierarchical", ", ".join(Clustering)),
        ("--linkage", "Average", "average", "average, single, complete, ward, loss"),
        ("--merge", "freqency", "frequency", ", ".join(Merge)),
        ("--router", "dominat", "dominant", "dominant, frequency, average, membership, fit"),
        ("--layout", "reduce", "reduced", ", ".join(Layout)),
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
    assert "'manhattan' is unknown. Known values: euclidean, cosine, kl-divergence, wasserstein." in error


@pytest.mark.parametrize(
    ("option", "word", "meant"),
    [
        ("--clustering", "k-means", "'kmeans'"),
        ("--clustering", "kmeans++", "'kmeans'"),
        ("--kmeans-start", "kmeans++", "'k-means++'"),
        ("--similarity", "eo", "'expert-output'"),
        ("--similarity", "weight+rl", "'router-logits'"),
        ("--distance", "kl", "'kl-divergence'"),
        ("--merge", "freq", "'frequency'"),
        ("--merge", "weighted", "'average' or 'dominant'"),
        ("--merge", "fix-dom-same", "'fix-dom'"),
        ("--features", "act", "'activation'"),
        ("--features", "act+weight", "'activation+weight'"),
        ("--saliency", "freq", "'frequency'"),
        ("--method", "pruned", "'prune'"),
        ("--budget", "msmoe", "'m-smoe'"),
        ("--align", "no", "'none'"),
    ],
)
def test_names_of_the_published_code_are_answered_with_ours(run, option, word, meant):
    error = usage_error(run, "convert", "model", "--experts", "4", option, word)
    assert f"is unknown; did you mean {meant}?" in error


@pytest.mark.parametrize("words", ["2", "2,1,1", "two,one", "nan,1", "1e9,1", ""])
def test_bad_dominant_weights_are_one_message(run, words):
    error = usage_error(run, "convert", "model", "--experts", "4", f"--dominant-weights={words}")
    assert f"'{words}' is not a pair of weights; write two numbers such as 2,1." in error


@pytest.mark.parametrize(
    ("option", "text", "problem"),
    [
        ("--layers", "0-x", "'0-x' is not a valid layer"),
        ("--layers", "", "'' is not a valid layer"),
        ("--layers", "5-3", "the range '5-3' ends before it begins"),
        ("--layers", "0-999999999", "'0-999999999' is not a valid layer"),
        ("--protect", "3:", "'' is not a valid expert"),
        ("--protect", "a:1", "'a' is not a valid layer"),
        ("--protect", "1:-2", "'-2' is not a valid expert"),
        ("--protect", "@no/such/file", "the list of experts no/such/file cannot be read"),
    ],
)
def test_bad_list_is_one_message(run, option, text, problem):
    assert problem in usage_error(run, "convert", "model", "--experts", "4", f"{option}={text}")


@pytest.mark.parametrize("option", ["--max-memory", "--max-shard-size"])
@pytest.mark.parametrize("size", ["5 apples", "5", "GB", "-5GB", "0GB", "5GiB", "1e3GB"])
def test_bad_size_is_one_message(run, option, size):
    error = usage_error(run, "convert", "model", "--experts", "4", f"{option}={size}")
    assert f"'{size}' is not a size; write a number and KB, MB, GB, TB, such as 5GB." in error


@pytest.mark.parametrize(
    "option",
    [
        "--experts",
        "--experts-per-token",
        "--samples",
        "--sequence-length",
        "--feature-tokens",
        "--batch-tokens",
        "--max-cluster-size",
    ],
)
@pytest.mark.parametrize("number", ["0", "-1", "many", "1.5"])
def test_number_below_one_is_refused(run, option, number):
    assert option in usage_error(run, "convert", "model", "--experts", "4", f"{option}={number}")


def test_json_and_quiet_exclude_each_other(run):
    error = usage_error(run, "convert", "model", "--experts", "4", "--json", "--quiet")
    assert "--quiet" in error
    assert "--json" in error


@pytest.mark.parametrize("flag", ["--private", "--create-pr"])
def test_what_a_push_would_be_like_is_refused_without_one(run, flag):
    error = usage_error(run, "convert", "model", "--experts", "4", flag)
    assert flag in error
    assert "has no effect without --push-to." in error


def test_old_name_of_refit_works_and_says_the_new_one(run, quick):
    by_old, by_new = (run(*quick, flag, "down", "--dry-run", "--json") for flag in ("--correct", "--refit"))
    assert (by_old.code, by_new.code) == (0, 0)
    assert by_old.document()["method"] == by_new.document()["method"]
    assert by_old.document()["method"]["refit"] == "down"
    assert "Warning: --correct is now called --refit.\n" in by_old.stderr
    assert "--correct" not in by_new.stderr


def test_both_names_of_refit_agree_or_are_refused(run, quick):
    assert run(*quick, "--correct", "down", "--refit", "down", "--dry-run").code == 0
    error = usage_error(run, *quick, "--correct", "down", "--refit", "block", "--dry-run")
    assert "--correct" in error
    assert "is the old name of --refit, and --refit block is given as well." in error
