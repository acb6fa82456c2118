"""Whole cards, byte for byte: what a practitioner reads."""

import json
import os
from typing import Any

import pytest
from huggingface_hub import ModelCard
from places import GOLDEN
from recovery_records import LORA, NOTHING, RECOVERY

from hcsmoe_hub.model_cards import write_card
from hcsmoe_hub.options import Budget, Layout, MethodOptions, Preset, Refit
from hcsmoe_hub.recipe.resolve import resolve

GOLDEN = GOLDEN / "cards"
LOCAL = {"path": "private-mixtral", "revision": None}


@pytest.fixture
def cases(make_folder: Any, evaluated: Any, report: Any, measures: Any) -> Any:
    """Makes the folder of each case by its name."""
    from_hub = {"base_model": {"repo_id": "acme/Mixtral-tiny", "revision": "0123456789abcdef0123456789abcdef01234567"}}
    tasks = {
        "settings": {"tasks": ["arc_easy", "my_task"], "dtype": "float32", "device": "cpu"},
        "versions": {"lm_eval": "0.4.13"},
        "model": {
            "tasks": {
                "arc_easy": {"acc": 0.61, "acc_stderr": 0.0123, "acc_norm": 0.58, "acc_norm_stderr": 0.0121},
                "my_task": {"word_perplexity": 31.25, "word_perplexity_stderr": None},
            },
            "average": None,
        },
        "base": {
            "tasks": {
                "arc_easy": {"acc": 0.72, "acc_stderr": 0.0111, "acc_norm": 0.7, "acc_norm_stderr": 0.0113},
                "my_task": {"word_perplexity": 20.5, "word_perplexity_stderr": None},
            },
            "average": None,
        },
    }
    found = {name: {**measure, **from_hub} for name, measure in {**measures, "tasks": tasks}.items()}
    silent = {"repo_id": "acme/Mixtral-tiny", "revision": "0123456789abcdef0123456789abcdef01234567", "license": None}
    other = {"license": "other", "license_name": "tongyi-qianwen", "license_link": "LICENSE"}
    pruned = resolve(MethodOptions(preset=Preset.REAP, refit=Refit.DOWN)).as_dict()
    refit = {"is_kept": True, "error_before": 0.4, "error_after": 0.3, "fitted_tokens": 896, "held_out_tokens": 128}
    refit |= {"rounds": 1, "steps": 0}
    unfitted = {"is_fitted": None, "top_k_agreement_before": None}
    kept_rows = {"policy": "kept rows", "top_k_agreement": 0.5, **unfitted}
    pruned_labels = [0, -1, -1, 1, -1, 2, 3, -1]
    layer_changes = {"refit": refit, "router": kept_rows, "labels": pruned_labels, "dominant": [0, 3, 5, 6]}
    dropped = {**report, "layers": [{**layer, **layer_changes} for layer in report["layers"]]}
    unchanged = {"policy": "unchanged", "top_k_agreement": 1.0, **unfitted}
    tied = {**report, "layers": [{**layer, "router": unchanged} for layer in report["layers"]]}
    local = {
        "calibration": {"dataset": "calib.jsonl"},
        "warnings": ["calib.jsonl fills 20 of 32 calibration sequences."],
    }
    row = {"tokens": 8184, "perplexity_before": 11.25, "perplexity_after": 13.95, "ratio": 1.24, "kl": 0.1875}
    row |= {"top1_agreement": 0.815}
    parts = {"code": (1.19, 13.3875), "prose": (1.29, 14.5125)}
    domains = {
        name: {**row, "tokens": 4092, "ratio": ratio, "perplexity_after": after}
        for name, (ratio, after) in parts.items()
    }
    figures = {"sequences": 16, "sequence_length": 512, "sha256": "0" * 64, "overall": row, "domains": domains}
    mapped = resolve(MethodOptions(layout=Layout.MAPPED, budget=Budget.FREQUENCY)).as_dict()
    refit = json.loads((GOLDEN / "report-refit.json").read_text("utf-8"))
    return {
        "unmeasured": lambda: make_folder(files=("tokenizer.json", "chat_template.jinja", "hcsmoe.png")),
        "evaluated": lambda: evaluated(found),
        "license-other": lambda: make_folder(source={**silent, **other}, files=("tokenizer.json", "LICENSE")),
        "no-license": lambda: make_folder(source=silent),
        "gated": lambda: make_folder(source={**silent, "license": "llama3", "gated": True}),
        "local": lambda: make_folder(local, source=LOCAL),
        "pruned": lambda: make_folder({"method": pruned}, base=dropped),
        "mapped": lambda: make_folder({"method": mapped}, config={"num_local_experts": 8}, base=tied),
        "refit": lambda: make_folder(base=refit),
        "held-out": lambda: make_folder({"measured": figures}),
        "recovered": lambda: make_folder({"measured": figures, "recovery": RECOVERY}),
        "recovered-lora": lambda: make_folder({"recovery": LORA}),
        "recovered-not": lambda: make_folder({"measured": figures, "recovery": NOTHING}),
    }


CASES = (
    "unmeasured",
    "evaluated",
    "license-other",
    "no-license",
    "gated",
    "local",
    "pruned",
    "mapped",
    "refit",
    "held-out",
    "recovered",
    "recovered-lora",
    "recovered-not",
)


@pytest.mark.parametrize("case", CASES)
def test_card_is_the_golden_one(cases: Any, case: str) -> None:
    repo_id = None if case == "local" else "me/mixtral-tiny-4e"
    card = write_card(cases[case](), repo_id).path.read_text("utf-8")
    golden = GOLDEN / f"{case}.md"
    if os.environ.get("HCSMOE_GOLDEN") == "write":
        golden.write_text(card, "utf-8")
    assert card == golden.read_text("utf-8")


@pytest.mark.parametrize("case", CASES)
def test_golden_card_is_read_by_the_client_as_it_stands(case: str) -> None:
    text = (GOLDEN / f"{case}.md").read_text("utf-8")
    card = ModelCard(text)
    assert str(card) == text
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    # What is not this model's.
    assert data.keys().isdisjoint({"datasets", "widget", "metrics", "co2_eq_emissions", "extra_gated_prompt"})
    assert "merge" not in data["tags"]


def test_there_is_no_golden_card_without_a_case() -> None:
    assert {file.stem for file in GOLDEN.glob("*.md")} - {"README"} == set(CASES)
