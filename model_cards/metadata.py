"""The front matter of a card: what the Hub reads of it."""

import posixpath
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData

from hcsmoe_hub.model_cards.facts import Facts
from hcsmoe_hub.model_cards.papers import papers

LIBRARY = "transformers"
DEFAULT_TASK = "text-generation"
RELATION = "finetune"
OPEN_LICENSE = "other"

# Where tasks of lm-eval get their questions: dataset of the Hub, its configuration, and the split that is scored.
DATASETS: Mapping[str, tuple[str, str | None, str]] = {
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "boolq": ("aps/super_glue", "boolq", "validation"),
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "mmlu": ("cais/mmlu", None, "test"),
    "openbookqa": ("allenai/openbookqa", "main", "test"),
    "rte": ("nyu-mll/glue", "rte", "validation"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
}
# Datasets that the Hub keeps a leaderboard of, as far as their tasks are scored by log-likelihood; percent.
BENCHMARKS: Mapping[str, tuple[str, str]] = {"gpqa_diamond_zeroshot": ("Idavidrein/gpqa", "gpqa_diamond")}
METRICS: Mapping[str, str] = {"acc": "accuracy", "acc_norm": "accuracy"}


def card_data(facts: Facts) -> ModelCardData:
    """Front matter.

    Never the base model's: its scores, training data, widget examples and emissions are not this model's.

    The Hub knows four relations to a base model: ``adapter``, ``merge``, ``quantized`` and ``finetune``, and none for
    fewer experts. ``merge`` stands for several base models, and so does the tag of that name; the weights keep their
    precision and need no base model to run. What is left is ``finetune``, a changed copy of one model. It is written
    out, as the Hub guesses from the files where it is missing.
    """
    inherited, base = facts.inherited, facts.base
    results = list(eval_results(facts))
    return ModelCardData(
        library_name=LIBRARY,
        pipeline_tag=inherited.pipeline_tag or DEFAULT_TASK,
        base_model=base.repo_id,
        base_model_relation=None if base.repo_id is None else RELATION,
        # The client calls both one text, and the Hub takes lists as well.
        license=inherited.license,  # type: ignore[arg-type]
        license_name=inherited.license_name,
        license_link=license_link(facts),
        language=inherited.language,
        tags=list(_tags(facts)),
        model_name=facts.title if results else None,
        eval_results=results or None,
    )


def license_link(facts: Facts) -> str | None:
    """Where the licence is: a URL, a file that came along, or that file in the base model's repository."""
    link, base = facts.inherited.license_link, facts.base
    if link is None or urlsplit(link).scheme in ("http", "https"):
        return link
    file = posixpath.normpath(link)
    if file in facts.files:
        return file
    if base.repo_id is None or file.startswith((".", "/")):
        return None
    return f"https://huggingface.co/{base.repo_id}/blob/{base.revision or 'main'}/{file}"


def _tags(facts: Facts) -> Iterator[str]:
    yield from ("moe", facts.base.model_type, "model-compression", "hcsmoe")
    if facts.changed:
        yield "expert-pruning" if facts.is_pruned else "expert-merging"
    for paper in papers(facts):
        yield paper.tag


def eval_results(facts: Facts) -> Iterator[EvalResult]:
    """What was measured of this model, for ``model-index``; never what was measured of another."""
    for name, metric, key in (("perplexity", "perplexity", "perplexity"), ("choices", "accuracy", "accuracy")):
        if name in facts.measures:
            measure = facts.measures[name]
            file, row = measure["file"], measure["model"]["overall"]
            yield EvalResult(
                task_type=DEFAULT_TASK,
                dataset_type=file["name"],
                dataset_name=file["name"],
                dataset_args={"sha256": file["sha256"]},
                metric_type=metric,
                metric_value=round(row[key], 4),
                metric_name=f"{metric} per token, windows of {measure['settings']['window']}"
                if name == "perplexity"
                else metric,
            )
    tasks: Mapping[str, Any] = facts.measures.get("tasks", {}).get("model", {}).get("tasks", {})
    for task, row in tasks.items():
        dataset, config, split = DATASETS.get(task, (task, None, None))
        for metric, value in row.items():
            if metric in METRICS and value is not None:
                yield EvalResult(
                    task_type=DEFAULT_TASK,
                    dataset_type=dataset,
                    dataset_name=task,
                    dataset_config=config,
                    dataset_split=split,
                    metric_type=METRICS[metric],
                    metric_name=metric,
                    metric_value=round(value, 4),
                )


def benchmark_entries(facts: Facts) -> list[EvalResultEntry]:
    """Entries of ``.eval_results`` for the leaderboards of the Hub; usually none."""
    measure: Mapping[str, Any] = facts.measures.get("tasks", {})
    tasks = measure.get("model", {}).get("tasks", {})
    return [
        EvalResultEntry(
            dataset_id=dataset,
            task_id=task_id,
            value=round(100 * tasks[task]["acc"], 2),
            notes=f"zero-shot, choices scored by log-likelihood, lm-eval {measure['versions']['lm_eval']}",
        )
        for task, (dataset, task_id) in BENCHMARKS.items()
        if tasks.get(task, {}).get("acc") is not None
    ]
