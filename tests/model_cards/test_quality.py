"""Figures in a card: of these weights, next to the model that they were measured with."""

from typing import Any

import pytest

from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.model_cards import write_card

ELSEWHERE = {"repo_id": "acme/other", "revision": "feedbeef00", "fingerprint": "0"}


def card(folder: Any) -> str:
    return write_card(folder).path.read_text("utf-8")


def only(measures: Any, name: str, **changes: Any) -> Any:
    return {name: {**measures[name], **changes}}


def test_figures_of_other_weights_are_left_out_with_a_warning(evaluated: Any) -> None:
    written = write_card(evaluated(fingerprint="0" * 64))
    assert written.measures == []
    assert any("are of other weights" in warning for warning in written.warnings)
    text = written.path.read_text("utf-8")
    assert "Not measured." in text
    assert "model-index" not in text


def test_another_model_next_to_it_is_not_called_the_base(evaluated: Any, measures: Any) -> None:
    found = {name: {**measure, "base_model": ELSEWHERE} for name, measure in measures.items()}
    text = card(evaluated(found))
    assert "| domain | tokens | acme/other @ feedbee | this model | ratio |" in text
    assert "this model and acme/other @ feedbee agree on the most likely token" in text


def test_another_commit_of_the_base_is_not_called_the_base(evaluated: Any, measures: Any) -> None:
    base = {"repo_id": "acme/Mixtral-tiny", "revision": "feedbeef00", "fingerprint": "0"}
    text = card(evaluated(only(measures, "perplexity", base_model=base)))
    assert "acme/Mixtral-tiny @ feedbee" in text


@pytest.mark.parametrize(("same", "title"), [(True, "base"), (False, "model")])
def test_folders_of_one_name_are_distinguished_by_what_they_hold(
    evaluated: Any, measures: Any, same: bool, title: str
) -> None:
    source = {"path": "model", "revision": None, "fingerprint": "1" * 64}
    measured = {**source, "fingerprint": "1" * 64 if same else "2" * 64}
    text = card(evaluated(only(measures, "perplexity", base_model=measured), source=source))
    assert f"| domain | tokens | {title} | this model |" in text


def test_without_a_base_its_columns_are_gone(evaluated: Any, measures: Any) -> None:
    alone = {"base": None, "base_model": None}
    text = card(evaluated({name: {**measures[name], **alone} for name in ("perplexity", "choices", "loops")}))
    assert "| domain | tokens | this model |" in text
    assert "| domain | items | this model |" in text
    assert "end in a loop." in text


def test_names_of_domains_do_not_break_a_table(evaluated: Any, measures: Any) -> None:
    rows = {"domains": {"a|b\nc": {"perplexity": 3.0, "tokens": 10}}, "overall": {"perplexity": 3.0, "tokens": 10}}
    text = card(evaluated(only(measures, "perplexity", model=rows, base=None)))
    assert "| a\\|b c | 10 | 3.000 |" in text


def test_a_mean_is_shown_where_every_task_has_an_accuracy(evaluated: Any) -> None:
    tasks = {
        "settings": {"tasks": ["rte"], "dtype": "float32", "device": "cuda"},
        "versions": {"lm_eval": "0.4.13"},
        "base_model": None,
        "model": {"tasks": {"rte": {"acc": 0.5, "acc_stderr": 0.01}}, "average": 0.5},
        "base": {"tasks": {"rte": {"acc": 0.625, "acc_stderr": 0.01}}, "average": 0.625},
    }
    text = card(evaluated({"tasks": tasks}))
    assert "| mean | acc | 62.5 % | 50.0 % | 80.0 % |" in text
    assert "Computed in float32 on cuda." in text


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("perplexity", {"model": {"overall": {}, "domains": {}}}, "perplexity.model.overall.perplexity is missing"),
        ("choices", {"file": {"name": 3}}, "choices.file.name is 3, not text"),
        ("loops", {"model": None}, "loops.model is null, not an object"),
    ],
)
def test_damaged_results_are_refused(evaluated: Any, measures: Any, name: str, changes: Any, reason: str) -> None:
    with pytest.raises(SourceError, match=reason):
        card(evaluated(only(measures, name, **changes)))


def spread(median: float) -> dict[str, float]:
    return {"median": median, "min": 0.9 * median, "max": 1.1 * median}


def figures(scale: float, **changes: Any) -> Any:
    rate = {"seconds": spread(1 / scale), "tokens_per_second": spread(256 * scale)}
    return {
        "parameters": round(8e9 / scale),
        "active_parameters": 2_000_000_000,
        "embedding_parameters": 100_000_000,
        "disk_bytes": round(16e9 / scale),
        "memory_bytes": round(16e9 / scale),
        "prefill_flops": 4_000_000_000,
        "decode_flops": 4_100_000_000,
        "is_attention_masked": True,
        "flops_problem": None,
        "throughput": {"1": {"prefill": rate, "decode": rate}},
        "throughput_problem": None,
        "peak_memory": {"process": 500_000_000, "batches": {"1": round(17e9 / scale)}},
        "peak_memory_problem": None,
        **changes,
    }


def costs(**changes: Any) -> Any:
    settings = {
        "dtype": "bfloat16", "device": "cuda", "engine": "torch", "machine": "NVIDIA H100", "prompt_tokens": 256,
        "new_tokens": 32, "repetitions": 5, "batch_sizes": [1], "timing": True, "order": "in turns",
    }  # fmt: skip
    versions = {"torch": "2.13.0", "transformers": "5.23.0"}
    return {
        "settings": settings,
        "versions": versions,
        "base_model": None,
        "model": figures(2),
        "base": figures(1),
        **changes,
    }


def test_cost_is_a_table_of_its_own_that_names_the_machine(evaluated: Any, measures: Any) -> None:
    text = card(evaluated({**measures, "cost": costs()}))
    assert "## Cost\n\n|  | base | this model | ratio |\n| --- | ---: | ---: | ---: |\n" in text
    assert "| Parameters | 8.00 B | 4.00 B | 0.500 |" in text
    assert "| Decode, batch 1, tokens/s | 256 (230 to 282) | 512 (461 to 563) | 2.000 |" in text
    assert "Measured on NVIDIA H100 in bfloat16 with torch 2.13.0 and transformers 5.23.0" in text
    # Quality is computed in another precision, and elsewhere.
    assert "Computed in float32 on cpu." in text
    command = text.partition("hcsmoe evaluate")[2].partition("```")[0]
    assert "--cost" in command
    assert "--batch-sizes 1" in command
    assert "--repetitions" not in command


def test_cost_alone_says_nothing_about_quality(evaluated: Any) -> None:
    text = card(evaluated({"cost": costs(base=None)}))
    assert "|  | this model |\n| --- | ---: |\n| Parameters | 4.00 B |" in text
    assert "Not measured" in text
    assert "Its quality was not measured." in text
    assert "Computed in" not in text


def test_a_reason_stands_where_a_figure_was_left_out(evaluated: Any) -> None:
    missing = {
        "throughput": None,
        "throughput_problem": "its weights take 16.0 GB, too much for the 8.0 GB that are free",
    }
    text = card(evaluated({"cost": costs(base=figures(1, **missing))}))
    assert "| Prefill, batch 1, tokens/s | - | 512 (461 to 563) | - |" in text
    assert "Throughput of the base: left out, as its weights take 16.0 GB" in text
