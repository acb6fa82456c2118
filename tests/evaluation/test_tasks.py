"""Tasks through lm-eval: one defined here, without the network."""

import json
from importlib.util import find_spec

import pytest
from calibration_text import refusal, write_rows

from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.evaluation.choices import choice_pairs, mean_log_likelihoods
from hcsmoe_hub.evaluation.records import read_choices
from hcsmoe_hub.evaluation.tasks import GROUPS, find_tasks, measure_tasks
from hcsmoe_hub.evaluation.tokens import Tokens
from hcsmoe_hub.methods.quality.tally import proportion_error

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}"
doc_to_target: {target}
{choices}
metric_list:
{metrics}
"""
LM_EVAL = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval")


def write_task(folder, questions, name, *, kind="multiple_choice"):
    """A task file on the questions."""
    metrics = ("acc", "acc_norm") if kind == "multiple_choice" else ("exact_match",)
    content = TASK.format(
        name=name,
        data=questions,
        kind=kind,
        target="gold" if kind == "multiple_choice" else '"{{choices[0]}}"',
        choices="doc_to_choice: choices" if kind == "multiple_choice" else "",
        metrics="\n".join(f"  - metric: {metric}" for metric in metrics),
    )
    (folder / f"{name}.yaml").write_text(content)
    return folder / f"{name}.yaml"


def test_missing_library_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr("hcsmoe_hub.evaluation.tasks.find_spec", lambda name: None)
    error = refusal(lambda: find_tasks(["hc-smoe"]), PlanError)
    assert error.hint == "pip install 'hcsmoe[eval]'"


def test_group_holds_the_eight_tasks_of_the_paper():
    assert len(GROUPS["hc-smoe"]) == len(set(GROUPS["hc-smoe"])) == 8


@LM_EVAL
def test_task_file_is_measured_as_its_likelihoods_say(tmp_path, model, questions, loaded, streamed):
    manager, names = find_tasks([str(write_task(tmp_path, questions, "mine"))])
    assert names == ["mine"]
    tokens = Tokens(LocalSource(model))
    figures = measure_tasks(manager, names, tokens, loaded)
    items, _ = read_choices(questions)
    pairs = [choice_pairs(item, tokens) for item in items]
    # lm-eval puts no token before the context, and sums where hcsmoe takes the mean.
    plain = [[(context[1:], choice) for (context, choice), _ in choices] for choices in pairs]
    means = mean_log_likelihoods([pair for choices in plain for pair in choices], loaded, advance=lambda: None)
    right = 0
    for item, choices in zip(items, plain, strict=True):
        sums = [means[pair] * len(pair[1]) for pair in choices]
        right += sums.index(max(sums)) == item.gold
    row = figures["tasks"]["mine"]
    assert row["acc"] == figures["average"] == pytest.approx(right / len(items))
    assert row["acc_stderr"] == pytest.approx(proportion_error(row["acc"], len(items)))
    assert 0 <= row["acc_norm"] <= 1
    assert row["acc_norm_stderr"] > 0
    assert measure_tasks(manager, names, tokens, streamed) == figures


@LM_EVAL
def test_limit_asks_the_first_questions_only(tmp_path, model, questions, loaded):
    first = write_rows(tmp_path / "first.jsonl", [json.loads(line) for line in questions.read_text().splitlines()[:2]])
    figures = []
    for file, limit in ((first, None), (questions, 2)):
        manager, names = find_tasks([str(write_task(tmp_path, file, "mine"))])
        figures.append(measure_tasks(manager, names, Tokens(LocalSource(model)), loaded, limit=limit))
    assert figures[0] == figures[1]


@LM_EVAL
def test_folder_means_all_of_its_tasks(tmp_path, questions):
    for name in ("one", "two"):
        write_task(tmp_path, questions, name)
    assert sorted(find_tasks([str(tmp_path)])[1]) == ["one", "two"]
    assert find_tasks([str(tmp_path / "two.yaml")])[1] == ["two"]


@LM_EVAL
def test_task_that_generates_text_is_refused(tmp_path, model, questions, loaded):
    manager, names = find_tasks([str(write_task(tmp_path, questions, "free", kind="generate_until"))])
    error = refusal(lambda: measure_tasks(manager, names, Tokens(LocalSource(model)), loaded), PlanError)
    assert "generates text" in error.message


@LM_EVAL
def test_task_without_data_is_refused(tmp_path, model, loaded):
    manager, names = find_tasks([str(write_task(tmp_path, tmp_path / "none.jsonl", "empty"))])
    error = refusal(lambda: measure_tasks(manager, names, Tokens(LocalSource(model)), loaded), PlanError)
    assert error.message.startswith("lm-eval cannot run empty: ")


@LM_EVAL
def test_file_without_a_task_is_refused(tmp_path):
    write_rows(tmp_path / "list.yaml", [["w1"]])
    assert "does not define a task" in refusal(lambda: find_tasks([str(tmp_path / "list.yaml")]), PlanError).message
    assert "there is no task file" in refusal(lambda: find_tasks(["none.yaml"]), PlanError).message
