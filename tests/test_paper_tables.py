"""The papers' tables: the data file is consistent, its commands are accepted, and the script measures and compares."""

import importlib
import json
import shlex
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import typer
from calibration_text import VOCABULARY, write_rows, write_tokenizer
from places import ROOT
from tiny_models import build
from typer.testing import CliRunner

from hcsmoe_hub.cli.app import app
from hcsmoe_hub.evaluation.tasks import GROUPS

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("paper_data", "paper_commands", "paper_runs", "paper_report", "paper_small", "paper_tables")
    data, commanding, running, reporting, small, script = map(importlib.import_module, names)

DATA = data.load()
ROWS = list(DATA.conversions(DATA.tables))
CONVERSIONS = sorted({conversion for _, _, conversion in ROWS if conversion.recipe is not None}, key=str)
PAGE = ROOT / "docs" / "how-to" / "papers-tables.md"
# The only printed average that is not the mean of its row.
MISPRINTED = ("hc-smoe-10", None)


# The data file


def test_every_row_has_a_figure_for_every_task_and_a_known_method() -> None:
    for table, row, conversion in ROWS:
        assert len(row.published) == len(DATA.tasks[table.tasks])
        assert all(0 < figure < 1 for figure in row.published)
        assert row.recipe is None or row.recipe in DATA.recipes
        assert row.experts <= DATA.models[table.model]["experts"]
        assert (row.recipe is None) == (row.experts == DATA.models[table.model]["experts"]), conversion
        assert table.name == f"{table.paper}-{table.number}"


def test_the_mean_of_a_row_is_the_average_that_the_paper_prints() -> None:
    wrong = [(table.name, row.recipe) for table, row, _ in ROWS if abs(fmean(row.published) - row.average) > 1.01e-4]
    assert wrong == [MISPRINTED]


def test_figures_that_two_tables_share_are_the_same() -> None:
    found: dict[tuple[Any, str], tuple[float, str]] = {}
    different = set()
    for table, row, conversion in ROWS:
        for task, figure in zip(DATA.tasks[table.tasks], row.published, strict=True):
            earlier, _ = found.setdefault((conversion, task), (figure, table.name))
            if earlier != figure:
                different.add((table.name, row.recipe))
    assert different == {MISPRINTED}


def test_every_method_is_used_and_tasks_are_those_of_evaluate() -> None:
    assert {row.recipe for _, row, _ in ROWS} == {*DATA.recipes, None}
    assert DATA.tasks["hc-smoe"] == GROUPS["hc-smoe"]
    assert {task for group in DATA.tasks.values() for task in group} == set(DATA.columns)


def test_no_two_methods_have_the_same_options() -> None:
    assert len({frozenset(options.split("--")) for options in DATA.recipes.values()}) == len(DATA.recipes)


def test_every_table_of_both_papers_can_be_run_or_has_a_reason() -> None:
    numbers = {str(table.number) for table in DATA.tables if table.paper == "hc-smoe"}
    for each in DATA.not_run:
        if each["paper"] == "hc-smoe":
            numbers |= set(each["tables"].split(", "))
        assert each["reason"].endswith((".", ".)"))
    assert {str(number) for number in range(1, 24)} <= numbers


# Commands


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny models of the same architectures and numbers of experts, by the names of the data file."""
    top = tmp_path_factory.mktemp("papers")
    common = {"vocab_size": VOCABULARY, "num_hidden_layers": 1, "max_position_embeddings": 64}
    mixtral = build(top / "mixtral", num_local_experts=8, bos_token_id=None, eos_token_id=0, **common)
    qwen = build(
        top / "qwen",
        "qwen2_moe",
        num_experts=60,
        num_experts_per_tok=4,
        shared_expert_intermediate_size=32,
        bos_token_id=None,
        eos_token_id=0,
        **common,
    )
    write_tokenizer(mixtral, eos_token="</s>")
    write_tokenizer(qwen, eos_token="</s>")
    return {"mixtral": str(mixtral), "mixtral-instruct": str(mixtral), "qwen": str(qwen)}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration files under the names that rows have for them."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("c4.jsonl", "math.jsonl", "codeqa.jsonl"):
        words = [" ".join(f"w{(number + 7 * step) % 400}" for step in range(90)) for number in range(40)]
        write_rows(folder / name, [{"text": text} for text in words])
    return folder


def by_share(conversion: Any) -> float:
    """Share of the experts that are not kept."""
    return -float(conversion.experts / DATA.models[conversion.model]["experts"])


def run(words: list[str]) -> str:
    done = CliRunner().invoke(app, words, prog_name="hcsmoe")
    assert done.exit_code == 0, f"{shlex.join(words)}\n{done.output}\n{done.exception!r}"
    return done.stdout


def test_the_plan_of_every_method_is_made(models: dict[str, str], texts: Path, tmp_path: Path) -> None:
    commands = commanding.Commands(
        data=DATA, sources=models, folder=tmp_path, calibration=str(texts / "c4.jsonl"), texts=texts, samples=4
    )
    # The smallest number of experts is the one that a method could refuse.
    for conversion in {conversion.recipe: conversion for conversion in sorted(CONVERSIONS, key=by_share)}.values():
        plan = json.loads(run([*commands.convert(conversion), "--dry-run", "--json"]))
        assert plan["experts"]["after"] == conversion.experts


def test_every_evaluation_is_one_that_the_command_line_parses() -> None:
    commands = commanding.Commands(data=DATA, limit=5)
    evaluate = typer.main.get_command(app).commands["evaluate"]  # type: ignore[attr-defined]
    for table, _, conversion in ROWS:
        words = commands.evaluate(conversion, table.tasks)
        parsed = evaluate.make_context("evaluate", words[1:], resilient_parsing=False).params
        assert parsed["limit"] == 5
        named = parsed["tasks"].split(",")
        assert [task for name in named for task in GROUPS.get(name, (name,))] == list(DATA.tasks[table.tasks])


def test_a_trial_has_a_folder_of_its_own() -> None:
    conversion = CONVERSIONS[0]
    places = {commanding.Commands(data=DATA, samples=samples).result(conversion) for samples in (None, 4, 8)}
    assert len(places) == 3


# Running


@pytest.fixture
def bench(models: dict[str, str], texts: Path, tmp_path: Path) -> Any:
    """Small runs of the real tables on tiny models; what was run is kept."""
    write_rows(tmp_path / "heldout.jsonl", [{"text": " ".join(f"w{number}" for number in range(40))}])
    write_rows(tmp_path / "questions.jsonl", [{"context": "w1 w2", "choices": [" w3", " w4"], "gold": 0}] * 3)
    commands = commanding.Commands(
        data=small.scaled(DATA),
        sources={"example": models["mixtral"]},
        folder=tmp_path,
        calibration=str(texts / "c4.jsonl"),
        texts=texts,
        samples=2,
        measures=("--perplexity", str(tmp_path / "heldout.jsonl"), "--choices", str(tmp_path / "questions.jsonl")),
    )
    done: list[list[str]] = []

    def runner(words: list[str]) -> None:
        done.append(words)
        run(words)

    return running.Runs(commands, runner), done


def test_a_small_table_has_every_row_and_nothing_is_done_twice(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    runs, done = bench
    table = next(table for table in runs.commands.data.tables if table.name == "hc-smoe-16")
    other = next(table for table in runs.commands.data.tables if table.name == "hc-smoe-17")
    found = script.run_small_table(runs.commands.data, table, runs)
    assert [words[0] for words in done] == ["convert", "evaluate"] * len(table.rows)
    assert set(found) == {table.conversion(row).name for row in table.rows}
    printed = capsys.readouterr().out
    assert all(reporting.share(row.average) in printed for row in table.rows)
    # Both tables have the same method and shares of the experts, so the example has run them.
    assert script.run_small_table(runs.commands.data, other, runs) == found
    assert len(done) == 2 * len(table.rows)


def test_weights_are_removed_once_measured_and_not_made_again(bench: Any) -> None:
    runs, done = bench
    removing = running.Runs(runs.commands, runs._run, removes=True)
    conversion = data.Conversion("example", 4, "f-prune")
    first = removing.measured(conversion, "hc-smoe")
    assert not list(runs.commands.result(conversion).glob("*.safetensors"))
    assert removing.report(conversion)["experts"]["after"] == 4
    assert removing.measured(conversion, "hc-smoe") == first
    assert len(done) == 2


def test_other_questions_are_asked_again(tmp_path: Path) -> None:
    conversion = data.Conversion("mixtral", 4, "hc-smoe")
    for limit, tasks, is_done in ((5, "hc-smoe", True), (5, "four", True), (None, "hc-smoe", False)):
        commands = commanding.Commands(data=DATA, folder=tmp_path, limit=limit)
        commands.result(conversion).mkdir(exist_ok=True)
        settings = {"tasks": list(DATA.tasks["hc-smoe"]), "limit": 5}
        commands.figures(conversion).write_text(json.dumps({"measures": {"tasks": {"settings": settings}}}))
        assert running.Runs(commands, print).is_measured(conversion, tasks) is is_done


def test_accuracies_are_compared_in_points_with_their_standard_errors() -> None:
    rows = {task: {"acc": 0.5, "acc_stderr": 0.02} for task in DATA.tasks["four"]}
    found = running.accuracies({"tasks": {"model": {"tasks": rows}}}, DATA.tasks["four"])
    assert found[-1].value == 0.5
    assert found[-1].error == pytest.approx(0.01)
    table = next(table for table in DATA.tables if table.name == "hc-smoe-5")
    text = reporting.compared(DATA, table, {table.rows[-1]: (found, 1.234)})
    assert "50.0 ±1.0 (+0.1) | 1.23 |" in text
    assert reporting.difference(running.Accuracy(0.5, None), 0.75) == "50.0 (-25.0)"


def test_rows_without_their_calibration_file_are_left_out(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    commands = commanding.Commands(data=DATA, texts=Path("none"))
    assert script._lacks_text(commands, data.Conversion("qwen", 45, "hc-smoe", "math.jsonl"))
    assert "there is no none/math.jsonl to calibrate on" in capsys.readouterr().out
    assert not script._lacks_text(commands, data.Conversion("qwen", 45, "hc-smoe"))


def test_small_texts_are_the_same_every_time_and_none_is_held_out_and_calibrated_on(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        small.write_texts(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    texts = {
        name: {json.loads(line)["text"][:400] for line in (tmp_path / "one" / name).read_text("utf-8").splitlines()}
        for name in files
        if name != small.QUESTIONS
    }
    held_out = texts.pop(small.HELD_OUT)
    assert held_out
    assert all(found and not found & held_out for found in texts.values())
    for line in (tmp_path / "one" / small.QUESTIONS).read_text("utf-8").splitlines():
        question = json.loads(line)
        assert len(set(question["choices"])) == small.CHOICES


# The command line and the page


def test_the_list_has_every_figure_and_command_of_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    script.main(["--table", "hc-smoe-13", "--list", "--model", "mixtral-instruct=/models/instruct"])
    printed = capsys.readouterr().out
    assert ".6806" in printed
    assert printed.count("hcsmoe convert /models/instruct") == 2
    assert printed.count("--tasks hc-smoe") == 3


def test_rows_are_chosen_by_method_or_number_and_the_source_stays() -> None:
    (by_name,) = script.chosen(DATA, ["hc-smoe-3"], ["prune"])
    (by_number,) = script.chosen(DATA, ["hc-smoe-3"], ["4"])
    assert [row.recipe for row in by_name.rows] == [None, *("o-prune", "f-prune", "s-prune") * 2]
    assert {row.experts for row in by_number.rows} == {8, 4}


def test_an_unknown_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--list", "--model", "gpt=somewhere"])
    assert "--model takes NAME=PLACE" in capsys.readouterr().err


def test_the_page_has_the_tables_and_commands_of_the_data_file() -> None:
    page = PAGE.read_text("utf-8")
    assert reporting.filled(page, DATA) == page
    shown = {name for _, name, _ in reporting.BLOCK.findall(page)}
    assert shown == {*(table.name for table in DATA.tables), reporting.NOT_RUN}
    for conversion in CONVERSIONS:
        assert page.count(f"--output {conversion.name}\n") == 1


def test_the_stored_small_run_has_every_row_of_every_table() -> None:
    stored = json.loads((ROOT / "benchmarks" / "paper_tables_small.json").read_text())
    scaled = small.scaled(DATA)
    expected = {table.name: {table.conversion(row).name for row in table.rows} for table in scaled.tables}
    found = {name: set(rows) for name, rows in stored["tables"].items()}
    assert found == expected
