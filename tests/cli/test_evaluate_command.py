"""``hcsmoe evaluate``: tables, one JSON document, and usage."""

import json

import pytest


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A few sentences of two domains."""
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [
        {"text": "The committee published its report on the first of March. " * 4, "domain": "prose"},
        {"text": "def area(width, height):\n    return width * height\n" * 4, "domain": "code"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def choices(text):
    """Two questions."""
    file = text.with_name("choices.jsonl")
    row = {"context": "The committee published", "choices": [" its report.", " return width"], "gold": 0}
    file.write_text("".join(json.dumps(row | {"domain": domain}) + "\n" for domain in ("prose", "code")))
    return file


def test_person_sees_a_table_per_measure(run, converted, example, text, choices, tmp_path):
    words = ["--perplexity", text, "--choices", choices, "--generate", 1, "--output", tmp_path / "figures.json"]
    result = run("evaluate", converted[0], "--base", example, *words)
    assert result.code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    titles = [line.partition(" ")[0] for line in lines if line.endswith("tokens)")]
    assert titles == ["perplexity", "agreement", "choices", "loops"]
    assert "DOMAIN MODEL BASE RATIO" in lines
    figures = json.loads((tmp_path / "figures.json").read_text())["measures"]["perplexity"]
    model, base = (figures[side]["overall"]["perplexity"] for side in ("model", "base"))
    assert f"overall {model:.3f} {base:.3f} {model / base:.4f}" in lines
    assert "evaluate started" in " ".join(result.stderr.split())
    assert f"the results are kept in {tmp_path / 'figures.json'}" in result.stderr


def test_document_is_what_the_file_holds(run, example, text, tmp_path):
    file = tmp_path / "figures.json"
    result = run("evaluate", example, "--perplexity", text, "--output", file, "--json")
    assert result.code == 0
    assert result.document() == json.loads(file.read_text())
    assert result.document()["measures"]["perplexity"]["base"] is None


def test_streaming_prints_the_same_table(run, example, text, tmp_path):
    words = ["--perplexity", text, "--output"]
    here = run("evaluate", example, *words, tmp_path / "here.json")
    there = run("evaluate", example, *words, tmp_path / "there.json", "--stream")
    assert (here.code, there.code) == (0, 0)
    assert here.stdout == there.stdout


def test_repository_needs_a_file_for_its_figures(run, tmp_path, monkeypatch):
    class Repository:
        label, path = "org/model", None

    monkeypatch.setattr("hcsmoe_hub.evaluation.evaluate.open_source", lambda source, **others: Repository())
    result = run("evaluate", "org/model", "--tasks", "hc-smoe")
    assert (result.code, result.stdout) == (1, "")
    assert result.stderr == (
        "Error: org/model is a repository, so there is no folder for the figures.\nHint: add --output FILE.json\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is nothing to measure"),
        (["--generate", "4"], "needs text to take its prompts from"),
        (["--perplexity", "none.jsonl"], "there is no file none.jsonl"),
        (["--choices", "none.jsonl"], "there is no file none.jsonl"),
    ],
)
def test_what_cannot_be_measured_is_a_known_failure(run, example, words, message, tmp_path):
    result = run("evaluate", example, *words, "--output", tmp_path / "figures.json")
    assert (result.code, result.stdout) == (1, "")
    assert message in result.stderr
    assert "Hint: " in result.stderr
    assert not (tmp_path / "figures.json").exists()


COST = ("--cost", "--prompt-tokens", 8, "--new-tokens", 2, "--repetitions", 1, "--batch-sizes", 1)


def test_person_sees_what_a_model_costs_next_to_its_base(run, converted, example, tmp_path):
    result = run("evaluate", converted[0], "--base", example, *COST, "--output", tmp_path / "figures.json")
    assert result.code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[:2] == ["cost", "COST BASE MODEL RATIO"]
    figures = json.loads((tmp_path / "figures.json").read_text())["measures"]["cost"]
    ratio = figures["model"]["parameters"] / figures["base"]["parameters"]
    assert next(line for line in lines if line.startswith("Parameters")).endswith(f"{ratio:.3f}")
    assert any(line.startswith("Decode, batch 1, tokens/s") for line in lines)
    assert "both models in turns" in " ".join(result.stdout.split())


def test_counting_alone_needs_no_run(run, example, tmp_path):
    result = run("evaluate", example, "--cost", "--no-timing", "--output", tmp_path / "figures.json")
    assert result.code == 0
    assert "FLOPs per token, prompt of 256" in result.stdout
    assert "tokens/s" not in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--engine", "vllm"), "--engine was given, but cost is not to be measured."),
        (("--no-timing",), "--no-timing was given, but cost is not to be measured."),
        (("--cost", "--engine", "vllm"), "--engine vllm runs vLLM, which is not installed."),
        (("--cost", "--batch-sizes", "1,x"), "'x' is not a batch size; write numbers such as 1,16."),
        (("--cost", "--prompt-tokens", 100000), "use a smaller --prompt-tokens or --new-tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_the_words_of_the_command_line(run, example, words, message):
    result = run("evaluate", example, *words)
    assert result.code == 2 or result.code == 1
    assert message in " ".join(result.stderr.replace("│", " ").split())
