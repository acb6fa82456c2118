"""``hcsmoe recover``: the summary, one JSON document, the dry run, what is refused, and how it goes on."""

import json
import shlex

import pytest

from hcsmoe_hub.events import Stage, StageAdvanced


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Many short documents."""
    file = tmp_path_factory.mktemp("text") / "chats.jsonl"
    rows = [{"text": f"The committee published report number {number} on the first of March."} for number in range(200)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def words(converted, example, text, tmp_path):
    """A recovery of three steps."""
    size = "--samples 24 --sequence-length 32 --batch-size 2 --max-steps 3 --evaluate-every 1 --held-out 0.2"
    return ["recover", converted[0], "--teacher", example, "--data", text, "--output", tmp_path / "r", *size.split()]


def flat(printed):
    """Lines with single blanks."""
    return [" ".join(line.split()) for line in printed.splitlines()]


def test_person_sees_what_was_trained_and_what_it_brought(run, words, converted, tmp_path):
    result = run(*words)
    assert result.code == 0, result.everything
    record = json.loads((tmp_path / "r" / "hcsmoe.json").read_text())["recovery"]
    lines = flat(result.stdout)
    before, after = (record[when]["perplexity"] for when in ("before", "after"))
    assert any(line.startswith(f"perplexity {before:.3f} {after:.3f}") for line in lines)
    assert f"path: {tmp_path / 'r'}" in lines
    assert any(line.startswith("trained router+experts+norms, ") for line in lines)
    assert any(line.startswith("steps 3 steps in ") and "then the steps were over" in line for line in lines)
    assert "recover 100 %: step 3, perplexity" in " ".join(result.stderr.split())
    assert f"check it with 'hcsmoe verify {tmp_path / 'r'}'" in result.stderr
    shown = run("inspect", tmp_path / "r").stdout
    assert f"held-out perplexity {before:.3f} -> {after:.3f}" in shown or "which brought nothing" in shown
    verified = run("verify", tmp_path / "r", "--against", words[3], "--json")
    assert verified.document()["ok"]
    card = run("card", tmp_path / "r", "--repo-id", "me/model", "--json")
    assert card.code == 0, card.everything
    assert "hcsmoe recover RESULT" in (tmp_path / "r" / "README.md").read_text()


def test_document_holds_the_record_of_the_report(run, words, tmp_path):
    result = run(*words, "--json", "--teacher-logits", tmp_path / "logits", "--top-logits", 4)
    assert result.code == 0, result.everything
    document = result.document()
    assert document["output"] == str(tmp_path / "r")
    assert document["recovery"] == json.loads((tmp_path / "r" / "hcsmoe.json").read_text())["recovery"]
    assert document["is_better"] == (document["recovery"]["kept_step"] > 0)
    assert document["recovery"]["settings"]["top_logits"] == 4
    lines = flat(result.stderr)
    assert any(line.startswith("teacher started: up to ") and f"{tmp_path / 'logits'}" in line for line in lines)


def test_every_setting_of_a_training_reaches_it(run, words):
    settings = {
        "--train": "experts+norms",
        "--temperature": 3,
        "--kd-weight": 0.5,
        "--text-weight": 0.25,
        "--learning-rate": 0.001,
        "--gradient-accumulation": 3,
        "--seed": 7,
        "--max-minutes": 30,
        "--patience": 2,
        "--dtype": "float32",
    }
    given = [part for option in settings.items() for part in option]
    result = run(*words, *given, "--gradient-checkpointing", "--json", "--device", "cpu")
    assert result.code == 0, result.everything
    found = result.document()["recovery"]["settings"]
    assert found == {
        "train": ["experts", "norms"],
        "lora_rank": None,
        "temperature": 3,
        "kd_weight": 0.5,
        "text_weight": 0.25,
        "learning_rate": 0.001,
        "batch_tokens": 2 * 3 * 32,
        "dtype": "float32",
        "seed": 7,
        "held_out": 0.2,
        "max_steps": 3,
        "max_minutes": 30,
        "evaluate_every": 1,
        "patience": 2,
        "top_logits": None,
    }


def test_quiet_prints_the_folder_alone(run, words, tmp_path):
    result = run(*words, "--quiet", "--train", "router")
    assert (result.code, result.stdout, result.stderr) == (0, f"{tmp_path / 'r'}\n", "")


def test_dry_run_counts_what_is_trained_and_the_memory(run, words, tmp_path):
    result = run(*words, "--dry-run", "--json", "--teacher-logits", tmp_path / "logits", "--top-logits", 8)
    assert result.code == 0, result.everything
    document = result.document()
    # Per layer, a router of 4 rows, 4 experts of three matrices, and two norms; and a norm after them.
    hidden, width = 128, 192
    assert document["trained"] == {
        "router": 4 * 4 * hidden,
        "experts": 4 * 4 * 3 * hidden * width,
        "norms": (2 * 4 + 1) * hidden,
    }
    count, memory = sum(document["trained"].values()), document["memory"]
    assert memory["gradients"] == 4 * count
    assert memory["optimizer"] == 8 * count
    assert memory["teacher"] == 0
    assert memory["total"] == sum(memory[part] for part in memory if part != "total")
    assert document["disk"]["logits"] == 24 * 32 * (8 * 4 + 8)
    assert document["steps"] == 3
    assert list(tmp_path.iterdir()) == []


def test_dry_run_shows_the_same_to_a_person(run, words, tmp_path):
    result = run(*words, "--dry-run", "--max-minutes", 5)
    lines = flat(result.stdout)
    assert "text chats.jsonl, up to 24 x 32 tokens" in [line.replace(str(words[5]), "chats.jsonl") for line in lines]
    assert "steps up to 3 and as many as fit 5 min, 64 tokens each" in lines
    assert any(line.startswith("total ") and line.endswith("and what the layers compute") for line in lines)
    assert "drop --dry-run to train" in result.stderr
    assert not (tmp_path / "r").exists()


def test_dry_run_of_lora_counts_its_factors(run, words):
    document = run(*words, "--dry-run", "--json", "--train", "lora", "--lora-rank", 2).document()
    assert list(document["trained"]) == ["lora"]
    assert 0 < document["trained"]["lora"] < document["parameters"] / 4


def test_a_missing_extra_is_one_message(run, words, monkeypatch):
    monkeypatch.setattr("hcsmoe_hub.recovery.lora.find_spec", lambda name: None)
    for dry in ([], ["--dry-run"]):
        result = run(*words, "--train", "lora", *dry)
        assert (result.code, result.stdout) == (1, "")
        assert result.stderr == (
            "Error: --train lora needs peft, which is not installed.\n"
            "Hint: install it with: pip install 'hcsmoe[recover]'\n"
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--temperature", "0"], "write a number above 0"),
        (["--temperature", "warm"], "is not a number"),
        (["--kd-weight", "nan"], "is not a number"),
        (["--text-weight", "-1"], "the lowest value is 0"),
        (["--held-out", "1"], "is not a share"),
        (["--train", "attention"], "is unknown"),
        (["--dtype", "float16"], "is unknown"),
        (["--json", "--quiet"], "cannot be combined"),
    ],
)
def test_wrong_values_are_usage_errors(run, words, given, message):
    result = run(*words, *given)
    assert result.code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--lora-rank", "4"], "--lora-rank 4 needs LoRA."),
        (["--train", "lora+router"], "--train router+lora does not work"),
        (["--kd-weight", "0"], "--kd-weight and --text-weight are both 0"),
        (["--data", "self"], "--data self has text that the source model writes"),
        (["--data", "none.jsonl"], "none.jsonl"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_the_words_of_the_command_line(run, words, given, message):
    result = run(*words, *given)
    assert (result.code, result.stdout) == (1, "")
    assert message in result.stderr.replace("\n", " ")


def test_an_interrupted_recovery_says_which_command_goes_on(run, words, monkeypatch, tmp_path):
    from hcsmoe_hub.cli import recover as command

    original = command.train

    def interrupted(*arguments, listener, **others):
        def listen(event):
            listener(event)
            if isinstance(event, StageAdvanced) and event.stage is Stage.RECOVER and event.detail.startswith("step 3"):
                raise KeyboardInterrupt

        return original(*arguments, listener=listen, **others)

    monkeypatch.setattr(command, "train", interrupted)
    result = run(*words)
    assert result.code == 130
    assert "what was done before is kept" in result.stderr
    assert f"go on with: {shlex.join(['hcsmoe', *map(str, words)])}" in result.stderr
    monkeypatch.setattr(command, "train", original)
    again = run(*words, "--json")
    assert again.code == 0, again.everything
    assert again.document()["recovery"]["steps"] == 3
    assert "recover Continuing at step 2 of 3." in flat(again.stderr)


def test_the_preview_is_refused_what_the_recovery_would_be(run, words, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.tex").touch()
    result = run(*words, "--dry-run")
    assert result.code == 1
    assert "is not empty" in result.stderr
