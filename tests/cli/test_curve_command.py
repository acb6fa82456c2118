"""``hcsmoe curve``: a table for a person, a document for a program, lines for a script."""

import pytest

SMALL = ("--samples", "8", "--sequence-length", "64", "--experts", "8,6", "--expert-width", "100%,50%")


@pytest.fixture(scope="module")
def document(run, example):
    """What a small curve of the example model prints with ``--json``."""
    finished = run("curve", example, *SMALL, "--json")
    assert finished.code == 0, finished.everything
    return finished.document()


def test_the_document_has_sizes_and_figures_of_every_point(document):
    assert [(point["experts"], point["expert_width"]) for point in document["points"]] == [
        (8, 192),
        (8, 96),
        (6, 192),
        (6, 96),
    ]
    whole, *others = document["points"]
    assert whole["measured"]["overall"]["ratio"] == 1
    assert whole["weights_bytes"] == document["weights_bytes"]
    for point in others:
        assert point["weights_bytes"] < whole["weights_bytes"]
        assert point["measured"]["overall"]["kl"] > 0
        assert [layer["layer"] for layer in point["layers"]] == [0, 1, 2, 3]
        assert all(0 < layer["predicted_loss"] < 1 for layer in point["layers"])
        assert all(layer["output_error"] > 0 for layer in point["layers"])
    assert document["prediction"]["points"] == 3


def test_the_table_says_what_is_predicted_and_what_is_measured(run, example):
    finished = run("curve", example, *SMALL)
    assert finished.code == 0, finished.everything
    heading = next(line for line in finished.stdout.splitlines() if "EXPERTS" in line)
    assert heading.split()[:9] == [
        "EXPERTS",
        "WIDTH",
        "PARAMETERS",
        "ACTIVE",
        "WEIGHTS",
        "LOST",
        "ERROR",
        "PREDICTED",
        "RATIO",
    ]
    assert "off by" in finished.stdout


def test_quiet_prints_a_line_per_point(run, example, document):
    finished = run("curve", example, *SMALL, "--quiet")
    lines = [line.split("\t") for line in finished.stdout.splitlines()]
    assert [(int(line[0]), int(line[1]), int(line[2])) for line in lines] == [
        (point["experts"], point["expert_width"], point["weights_bytes"]) for point in document["points"]
    ]
    assert finished.stderr == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--experts", "6,x"), "'x' is not a number of experts"),
        (("--expert-width", "75%,0"), "'0' is not a width"),
        (("--experts", "9"), "cannot keep 9 experts"),
        (("--figure", "/nowhere/curve.png"), "does not exist"),
    ],
)
def test_what_cannot_be_is_refused(run, example, words, said):
    finished = run("curve", example, *words)
    assert finished.code in (1, 2)
    assert said in " ".join(finished.stderr.split())
