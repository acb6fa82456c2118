"""Front matter: true of this model, and read by the client."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from recovery_records import NOTHING, RECOVERY

from hcsmoe_hub.model_cards import write_card

LICENSED = {"license": "other", "license_name": "acme", "license_link": "docs/LICENSE.md"}
HUB = {"repo_id": "acme/base", "revision": "abc1234"}


def data_of(folder: Path, repo_id: str | None = None) -> Any:
    return ModelCard(write_card(folder, repo_id).path.read_text("utf-8")).data.to_dict()


def test_a_folder_is_not_a_base_model_of_the_hub(make_folder: Any) -> None:
    data = data_of(make_folder(source={"path": "/models/base", "revision": None}))
    assert data.keys().isdisjoint({"base_model", "base_model_relation"})


def test_a_file_that_did_not_come_along_is_linked_where_it_is(make_folder: Any) -> None:
    link = data_of(make_folder(source={**HUB, **LICENSED}))["license_link"]
    assert link == "https://huggingface.co/acme/base/blob/abc1234/docs/LICENSE.md"


@pytest.mark.parametrize("link", ["https://acme.org/licence", "LICENSE.md"])
def test_a_link_that_leads_somewhere_is_kept(make_folder: Any, link: str) -> None:
    folder = make_folder(source={**HUB, **LICENSED, "license_link": link}, files=("LICENSE.md",))
    assert data_of(folder)["license_link"] == link


@pytest.mark.parametrize("link", ["../../secret", "/etc/passwd"])
def test_a_link_out_of_the_repository_is_dropped_with_a_warning(make_folder: Any, link: str) -> None:
    written = write_card(make_folder(source={**HUB, **LICENSED, "license_link": link}))
    assert "license_link" not in ModelCard(written.path.read_text("utf-8")).data.to_dict()
    assert any("is not among the files" in warning for warning in written.warnings)


def test_task_and_languages_are_those_of_the_base(make_folder: Any) -> None:
    data = data_of(make_folder(source={**HUB, "language": ["no", "en"], "pipeline_tag": "image-text-to-text"}))
    assert (data["language"], data["pipeline_tag"]) == (["no", "en"], "image-text-to-text")


def test_results_are_the_models_own(evaluated: Any, measures: Any) -> None:
    card = ModelCard(write_card(evaluated(), "me/result").path.read_text("utf-8"))
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    own = {name: measures[name]["model"]["overall"] for name in ("perplexity", "choices")}
    assert values["perplexity"] == pytest.approx(own["perplexity"]["perplexity"], abs=1e-4)
    assert values["accuracy"] == pytest.approx(own["choices"]["accuracy"], abs=1e-4)
    assert card.data.model_name == "result"


def test_nothing_measured_is_no_model_index(make_folder: Any) -> None:
    assert "model-index" not in data_of(make_folder())


def gpqa(accuracy: float) -> Any:
    return {
        "tasks": {
            "settings": {"tasks": ["gpqa_diamond_zeroshot"], "dtype": "float32", "device": "cpu"},
            "versions": {"lm_eval": "0.4.13"},
            "model": {"tasks": {"gpqa_diamond_zeroshot": {"acc": accuracy, "acc_stderr": 0.03}}, "average": accuracy},
        }
    }


def test_a_benchmark_of_the_hub_gets_its_entry_and_loses_it_again(evaluated: Any) -> None:
    folder = evaluated(gpqa(0.3125))
    write_card(folder)
    file = folder / ".eval_results" / "hcsmoe.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text("utf-8")))
    # Leaderboards count in percent.
    assert (entry.dataset_id, entry.task_id, entry.value) == ("Idavidrein/gpqa", "gpqa_diamond", 31.25)
    (folder / "hcsmoe-evaluation.json").unlink()
    write_card(folder)
    assert not file.exists()


def test_a_trial_on_some_questions_is_published_in_the_text_of_the_card_only(evaluated: Any) -> None:
    measures = gpqa(0.3125)
    measures["tasks"]["settings"]["limit"] = 20
    folder = evaluated(measures)
    write_card(folder)
    text = (folder / "README.md").read_text("utf-8")
    assert not (folder / ".eval_results").exists()
    assert "model-index" not in data_of(folder)
    assert "with standard errors, on the first 20 questions of each:" in text
    assert "--limit 20" in text


def test_other_measures_are_not_benchmarks_of_the_hub(evaluated: Any) -> None:
    folder = evaluated()
    write_card(folder)
    assert not (folder / ".eval_results").exists()


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("acme/chats:default:train", ["acme/chats"]),
        ("c4", ["allenai/c4"]),
        ("chats.jsonl=0.7,acme/chats=0.3", ["acme/chats"]),
        ("chats.jsonl", None),
        ("bundled", None),
    ],
)
def test_datasets_that_a_result_was_trained_on_are_named(
    make_folder: Any, dataset: str, expected: list[str] | None
) -> None:
    record = {**RECOVERY, "data": {**RECOVERY["data"], "dataset": dataset}}
    data = data_of(make_folder({"recovery": record}))
    assert data.get("datasets") == expected
    assert "knowledge-distillation" in data["tags"]
    assert data["base_model_relation"] == "finetune"


def test_a_training_that_brought_nothing_adds_neither_tags_nor_datasets(make_folder: Any) -> None:
    record = {**NOTHING, "data": {**NOTHING["data"], "dataset": "c4"}}
    data = data_of(make_folder({"recovery": record}))
    assert "datasets" not in data
    assert "knowledge-distillation" not in data["tags"]
