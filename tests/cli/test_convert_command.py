"""``hcsmoe convert`` on the example model."""

import json

import pytest
from tiny_models import build

from hcsmoe_hub.cli.summary import cost

SECRET = "hf_secret0123456789"


def test_json_is_one_document_and_nothing_else(converted):
    folder, result = converted
    assert result.code == 0
    assert result.stdout.count("\n") == 1
    document = result.document()
    assert document["output"] == str(folder)
    assert document["experts"] == {
        "before": 8,
        "after": 4,
        "per_token_before": 2,
        "per_token_after": 2,
        "moe_layers": 4,
    }


def test_json_is_the_written_report_and_the_output(converted):
    folder, result = converted
    document = result.document()
    del document["output"]
    written = json.loads((folder / "hcsmoe.json").read_text())
    # The report is written before its last stage, the check of what was written, has been timed.
    for report in (document, written):
        report["timings_seconds"].pop("verify", None)
    assert document == written


def test_stages_are_plain_lines_on_stderr_without_a_terminal(converted):
    _, result = converted
    lines = [line.split(maxsplit=1) for line in result.stderr.splitlines()]
    assert [stage for stage, _ in lines] == [
        stage for name in ("plan", "calibration", "convert", "measure", "verify") for stage in (name, name)
    ]
    assert [text.split()[0].rstrip(",") for _, text in lines] == ["started", "done"] * 5
    assert lines[4] == ["convert", "started, 4 layers"]
    assert lines[5][1].endswith(", 3.8 MB written")


def test_options_reach_the_conversion(run, quick, tmp_path):
    method = {"linkage": "complete", "distance": "cosine", "merge": "average", "router": "frequency"}
    calibration = {"samples": "1", "sequence-length": "32", "seed": "7"}
    others = {
        "experts-per-token": "1",
        "device": "cpu",
        "batch-tokens": "32",
        "max-shard-size": "1MB",
    }
    words = [f"--{name}={value}" for name, value in (method | calibration | others).items()]
    result = run(*quick, *words, "--max-memory", "100GB", "--output", tmp_path / "result", "--json")
    assert result.code == 0
    document = result.document()
    assert document["experts"]["per_token_after"] == 1
    assert document["method"].items() >= method.items()
    assert document["calibration"].items() >= {"sequences": 1, "sequence_length": 32, "seed": 7}.items()
    assert len(list((tmp_path / "result").glob("*.safetensors"))) > 2


def test_every_choice_of_the_method_reaches_the_conversion(run, quick):
    method = {
        "budget": "frequency",
        "layout": "full",
        "layers": "1,3",
        "protect": "3:1,*:0",
        "clustering": "kmeans",
        "similarity": "weight+router-weight",
        "distance": "cosine",
        "kmeans-start": "random",
        "dominant": "saliency",
        "max-cluster-size": "5",
        "merge": "dominant",
        "dominant-weights": "2,1",
        "align": "weight",
        "seed": "7",
    }
    result = run(*quick, "--dry-run", "--json", *(f"--{name}={value}" for name, value in method.items()))
    assert result.code == 0
    document = result.document()
    numbers = {"layers": [1, 3], "max-cluster-size": 5, "dominant-weights": [2.0, 1.0], "seed": 7}
    expected = {name.replace("-", "_"): value for name, value in (method | numbers).items()}
    assert document["method"].items() >= expected.items()
    assert document["calibration"]["seed"] == 7


def test_choice_without_effect_is_refused(run, quick):
    refused = run(*quick, "--method", "prune", "--linkage", "ward")
    assert refused.code == 1
    assert "--linkage ward would have no effect" in refused.stderr
    assert "Hint: leave --linkage out" in refused.stderr
    twice = run(*quick, "--similarity", "weight+weight")
    assert (twice.code, "names a similarity twice" in twice.stderr) == (1, True)


def test_figure_lies_next_to_the_weights(run, quick, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "result"
    result = run(*quick, "--output", folder, "--figure", "--json")
    assert result.document()["figure"] == str(folder / "hcsmoe.png")
    assert (folder / "hcsmoe.png").read_bytes().startswith(b"\x89PNG")


def test_full_layout_shows_stored_and_distinct_experts(run, quick, tmp_path):
    result = run(*quick, "--layout", "full", "--output", tmp_path / "result")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0].startswith("✓ Converted to 4 distinct experts per layer in ")
    assert "experts per layer 8 8 4 distinct" in lines
    assert not any(line.startswith("top-k agreement") for line in lines)


def test_quiet_prints_only_the_path(run, quick, tmp_path):
    # Two experts per token of two: a warning is due, and kept back.
    result = run(*quick, "--experts", "2", "--output", tmp_path / "result", "--quiet")
    assert (result.code, result.stdout, result.stderr) == (0, f"{tmp_path / 'result'}\n", "")


def test_person_sees_what_was_made_and_what_to_do_next(run, measuring, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*measuring)
    assert result.code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0].startswith("✓ Converted to 4 experts per layer in ")
    assert lines[1] == "path: tiny-mixtral-hcsmoe-4e"
    assert "SOURCE RESULT" in lines
    assert "experts per layer 8 4" in lines
    assert "parameters 3.09 M 1.90 M -38.3 %" in lines
    assert "weights 6.2 MB 3.8 MB -38.3 %" in lines
    assert any(line.startswith("top-k agreement ") and "%" in line for line in lines)
    assert any(line.startswith("output error ") and "%" in line for line in lines)
    assert any(line.startswith("perplexity x") and "held-out tokens" in line for line in lines)
    assert any(line.startswith("same top token ") and "%" in line for line in lines)
    assert lines[-1] == (
        "Held-out text of the calibration set, and averages over 4 MoE layers on calibration text. "
        "See also `hcsmoe evaluate`."
    )
    assert any(line.startswith("silhouette ") for line in lines)
    hint = "Hint: check it with 'hcsmoe verify tiny-mixtral-hcsmoe-4e', look at its clusters with 'hcsmoe inspect"
    assert result.stderr.endswith(f"{hint} tiny-mixtral-hcsmoe-4e'\n")


DOMAINS = ("code", "prose", "dialogue", "mathematics", "french", "german", "spanish")


@pytest.mark.parametrize("domains", [1, 2, 7])
def test_person_sees_what_it_cost_the_worst_domain_first(domains):
    row = {"tokens": 16384, "perplexity_before": 10.0, "perplexity_after": 12.4, "ratio": 1.24, "kl": 0.1234}
    row |= {"top1_agreement": 0.815}
    named = {name: {**row, "ratio": 1.2 + number / 100} for number, name in enumerate(DOMAINS[:domains])}
    rows = cost({"overall": row, "domains": named})
    expected = {
        1: "on 16,384 held-out tokens",
        2: "on 16,384 held-out tokens: prose 1.21, code 1.20",
        7: "on 16,384 held-out tokens: spanish 1.26, german 1.25, 5 more",
    }
    assert rows[0] == ("perplexity", "x1.24", expected[domains])
    assert rows[1][:2] == ("same top token", "81.5 %")
    assert all(len(meaning) <= 70 for _, _, meaning in rows)


def test_no_measure_is_passed_on_and_explained(run, quick, tmp_path):
    result = run(*quick, "--output", tmp_path / "result")
    document = json.loads((tmp_path / "result" / "hcsmoe.json").read_text())
    assert (document["measured"], document["not_measured"]) == (None, "it was switched off")
    assert " ".join(result.stdout.split()).endswith(
        "Averages over 4 MoE layers on calibration text. Perplexity was not measured: it was switched off. "
        "Run `hcsmoe evaluate`."
    )


def test_warnings_are_on_stderr_and_in_the_document(run, quick, tmp_path):
    result = run(*quick, "--experts", "2", "--output", tmp_path / "result", "--json")
    (message,) = [text for text in result.document()["warnings"] if "dense" in text]
    assert result.stderr.count(f"Warning: {message}\n") == 1


def test_full_output_folder_is_refused_and_overwritten_on_demand(run, quick, tmp_path):
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    refused = run(*quick, "--output", folder)
    assert (refused.code, refused.stdout) == (1, "")
    assert "--overwrite" in refused.stderr
    assert (folder / "config.json").read_text() == "{}"
    assert run(*quick, "--output", folder, "--overwrite", "--quiet").code == 0


@pytest.mark.parametrize("extra", [["--dry-run"], ["--json"], ["--experts", "99"]])
def test_token_is_never_shown(run, quick, tmp_path, extra):
    words = [*quick, "--output", str(tmp_path / "result"), *extra]
    by_option = run(*words, "--overwrite", "--token", SECRET, HCSMOE_DEBUG="1")
    by_variable = run(*words, "--overwrite", HF_TOKEN=SECRET, HCSMOE_DEBUG="1")
    assert by_option.code == by_variable.code == (1 if "99" in extra else 0)
    written = "".join(file.read_text() for file in tmp_path.rglob("*.json"))
    assert SECRET not in by_option.everything + by_variable.everything + written


def test_token_of_the_environment_is_not_shown_in_help_or_usage_errors(run):
    for words in (["convert", "--help"], ["convert", "model", "--experts", "0"], ["inspect", "--help"]):
        assert SECRET not in run(*words, HF_TOKEN=SECRET).everything


@pytest.mark.parametrize(("option", "value"), [("--mtp", "drop"), ("--dtype", "bfloat16")])
def test_an_option_for_what_the_source_lacks_is_refused_by_its_name(run, tmp_path, option, value):
    source = build(tmp_path / "model")
    result = run("convert", source, "--experts", "4", option, value, "--dry-run")
    assert result.code == 1
    assert option in result.stderr
