"""The benchmark of quality measures what ``hcsmoe evaluate`` measures, pairs what it compares, and resumes."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration_text import VOCABULARY, write_rows, write_tokenizer
from places import ROOT
from tiny_models import build

from hcsmoe_hub.evaluation.evaluate import evaluate
from hcsmoe_hub.evaluation.options import EvaluateOptions

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("quality_scores", "quality_statistics", "quality_store", "quality_tables", "quality_recipes", "quality")
    scoring, statistics, storing, tables, recipes, quality = map(importlib.import_module, names)

Key = storing.Key
SOURCE = Key("tiny", 8, "source", 0, "")


def words(start: int, count: int) -> str:
    """Words in an order that does not repeat."""
    return " ".join(f"w{(start + 37 * number + number * number) % 400}" for number in range(count))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral with a tokenizer."""
    folder = tmp_path_factory.mktemp("quality") / "model"
    build(folder, vocab_size=VOCABULARY, max_position_embeddings=256, bos_token_id=None, eos_token_id=0)
    return write_tokenizer(folder, eos_token="</s>")


@pytest.fixture(scope="module")
def files(model: Path) -> tuple[Path, Path]:
    """Text of two domains, one record longer than a window, and questions."""
    texts = [
        {"text": words(9 * number, 300 if number == 1 else 20), "domain": "code" if number % 3 else "prose"}
        for number in range(6)
    ]
    questions = [
        {"context": words(number, 5), "choices": [words(number + choice, 4) for choice in (50, 90)], "gold": number % 2}
        for number in range(5)
    ]
    return write_rows(model.parent / "text.jsonl", texts), write_rows(model.parent / "questions.jsonl", questions)


def test_records_and_questions_add_up_to_the_figures_of_evaluate(model: Path, files: tuple[Path, Path]) -> None:
    text, questions = files
    scores = scoring.HeldOut(text, questions, count=None).score(model)
    asked = EvaluateOptions(perplexity=text, choices=questions, output=model.parent / "figures.json", device="cpu")
    measures = evaluate(model, asked)[0]["measures"]
    expected = measures["perplexity"]["model"]["overall"]
    assert np.exp(scores.losses.sum() / scores.tokens.sum()) == pytest.approx(expected["perplexity"])
    assert scores.tokens.sum() == expected["tokens"]
    assert scores.right.mean() == measures["choices"]["model"]["overall"]["accuracy"]


def test_one_domain_is_measured_on_its_own_records(model: Path, files: tuple[Path, Path]) -> None:
    whole, part = scoring.HeldOut(files[0], None, count=None), scoring.HeldOut(files[0], None, count=None, only="prose")
    chosen = np.array(whole.domains) == "prose"
    np.testing.assert_allclose(part.score(model).losses, whole.score(model).losses[chosen], rtol=1e-5)


def test_a_model_agrees_with_itself_on_every_token(model: Path, files: tuple[Path, Path]) -> None:
    scores = scoring.HeldOut(files[0], None, count=4).score(model)
    assert scores.matches(scores).tolist() == scores.tokens.tolist()


# Statistics


def test_a_loss_that_is_the_same_everywhere_has_no_interval() -> None:
    tokens = np.array([10, 20, 5])
    found = statistics.ratio(tokens * 2.0, tokens * 1.5, tokens)
    assert found == pytest.approx((np.exp(0.5),) * 3)


def test_the_interval_of_a_ratio_covers_it_and_shrinks_with_the_number_of_records() -> None:
    generator = np.random.default_rng(1)
    widths = []
    for count in (50, 800):
        worse, tokens = generator.normal(20, 5, count), np.full(count, 100)
        found = statistics.ratio(worse, np.zeros(count), tokens)
        assert found.low < found.ratio < found.high
        widths.append(found.high - found.low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.3)


def test_a_difference_on_the_same_questions_is_surer_than_one_on_others() -> None:
    right = np.arange(100) < 60
    found = statistics.change(right, np.arange(100) < 57)
    assert found.change == pytest.approx(0.03)
    assert found.error < 0.02


# Rows


def filled(file: Path) -> Any:
    """A file with a source, two baselines, and the default with two seeds."""
    store = storing.Store(file, {"records": None})
    tokens, base = np.array([100, 100, 50]), np.array([200.0, 300.0, 100.0])
    domains = np.array(["prose", "code", "prose"])
    right = np.array([True, True, False, True])
    figures = {"perplexity": 11.0, "accuracy": 0.75, "loop_rate": None}
    store.add(SOURCE, figures, {"losses": base, "tokens": tokens, "right": right, "domains": domains})
    for recipe, seed, worse in (("reap", 42, 0.4), ("hc-smoe", 42, 0.8), ("default", 42, 0.1), ("default", 43, 0.12)):
        losses = base + worse * tokens
        found = statistics.ratio(losses, base, tokens)
        row = {"ratio": found, "accuracy": 0.5, "cpu_seconds": 20.0 if recipe == "default" else 10.0, "sequences": 8}
        arrays = {"losses": losses, "matches": tokens, "right": ~right}
        store.add(Key("tiny", 4, recipe, seed, "calib.jsonl"), row, arrays)
    store.add(Key("tiny", 4, "gram", 42, "calib.jsonl"), {"refused": "there is no such thing"}, {})
    return store


def test_rows_are_found_again_with_their_arrays(tmp_path: Path) -> None:
    written = filled(tmp_path / "rows.json")
    read = storing.Store(tmp_path / "rows.json", {"records": None})
    assert list(read.rows) == list(written.rows)
    key = Key("tiny", 4, "reap", 42, "calib.jsonl")
    assert read.array(key, "losses").tolist() == written.array(key, "losses").tolist()


def test_rows_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    filled(tmp_path / "rows.json")
    with pytest.raises(SystemExit, match="choose another"):
        storing.Store(tmp_path / "rows.json", {"records": 80})


def test_a_row_that_is_there_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path / "rows.json")
    monkeypatch.setattr(quality, "converted", lambda *args: pytest.fail("was converted"))
    bench = quality.Bench(quality.argparse.Namespace(), store)
    bench.measure(quality.Model("tiny", tmp_path, 8), Key("tiny", 4, "reap", 42, "calib.jsonl"), "calib.jsonl")


def test_the_tables_say_what_the_default_leaves_of_the_best_baseline_and_costs(tmp_path: Path) -> None:
    store = filled(tmp_path / "rows.json")
    text = "\n".join(tables.document([store]))
    left = np.expm1(0.11) / np.expm1(0.4)
    assert f"| tiny, 8 to 4 | REAP {np.exp(0.4):.3f} | {left:.2f} (at most 0.3) |  | 2.00 (at most 2.5) |" in text
    assert "#### tiny, 8 to 4 experts" in text
    assert "Gram matrix was refused: there is no such thing" in text


def test_every_recipe_has_a_title_and_a_known_group() -> None:
    assert len({recipe.title for recipe in recipes.RECIPES.values()}) == len(recipes.RECIPES)
    assert {recipe.group for recipe in recipes.RECIPES.values()} == {"baseline", "fit", "other"}


def test_a_domain_is_left_out_of_calibration_and_no_other(tmp_path: Path) -> None:
    rows = [{"text": "a", "domain": name} for name in ("prose", "code", "prose", "french")]
    file = write_rows(tmp_path / "calib.jsonl", rows)
    assert quality.domains_of(file) == ["code", "french", "prose"]
    assert quality.domains_of(quality.without(file, "prose", tmp_path)) == ["code", "french"]


def test_tables_name_calibration_files_without_their_folders(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "calib.jsonl", [])
    assert quality.label(f"{file}=0.5,self=0.5") == "calib.jsonl=0.5,self=0.5"
    assert quality.label("org/data:config:split") == "org/data:config:split"
