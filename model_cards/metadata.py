"""The front matter of a card: what the Hub reads of it."""

import posixpath
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData

from hcsmoe_hub.checkpoint.auto_class import auto_class
from hcsmoe_hub.evaluation.measures import File
from hcsmoe_hub.model_cards.card_data import CardData
from hcsmoe_hub.model_cards.papers import papers
from hcsmoe_hub.model_cards.recovered import recovery_datasets

LIBRARY = "transformers"
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


def front_matter(card: CardData) -> ModelCardData:
    """Front matter; never the base model's scores, training data, widget examples and emissions.

    ``datasets`` are those of the Hub that the result itself was trained on.

    The Hub knows four relations to a base model: ``adapter``, ``merge``, ``quantized`` and ``finetune``, and none for
    fewer experts. ``merge`` stands for several base models, and so does the tag of that name; the weights keep their
    precision and need no base model to run. What is left is ``finetune``, a changed copy of one model. It is written
    out because the Hub guesses it from the files where it is missing.
    """
    inherited, base = card.inherited, card.base
    results = list(eval_results(card))
    return ModelCardData(
        library_name=LIBRARY,
        pipeline_tag=inherited.pipeline_tag or auto_class(base.model_type).task,
        base_model=base.repo_id,
        base_model_relation=None if base.repo_id is None else RELATION,
        # The client calls both one text, and the Hub takes lists as well.
        license=inherited.license,  # type: ignore[arg-type]
        license_name=inherited.license_name,
        license_link=license_link(card),
        language=inherited.language,
        datasets=recovery_datasets(card) or None,
        tags=list(_tags(card)),
        model_name=card.title if results else None,
        eval_results=results or None,
    )


def license_link(card: CardData) -> str | None:
    """Where the licence is: a URL, a file that was copied along, or that file in the base model's repository."""
    link, base = card.inherited.license_link, card.base
    if link is None or urlsplit(link).scheme in ("http", "https"):
        return link
    file = posixpath.normpath(link)
    if file in card.files:
        return file
    if base.repo_id is None or file.startswith((".", "/")):
        return None
    return f"https://huggingface.co/{base.repo_id}/blob/{base.revision or 'main'}/{file}"


def _tags(card: CardData) -> Iterator[str]:
    yield from ("moe", card.base.model_type, "model-compression", "hcsmoe")
    if card.changed:
        yield "expert-pruning" if card.is_pruned else "expert-merging"
    if card.is_recovered:
        yield "knowledge-distillation"
    for paper in papers(card):
        yield paper.tag


def eval_results(card: CardData) -> Iterator[EvalResult]:
    """Measures of this model for ``model-index``, never those of its base."""
    task = auto_class(card.base.model_type).task
    if "perplexity" in card.measures:
        text = card.measures["perplexity"]
        name = f"perplexity per token, windows of {text['settings']['window']}"
        yield _of_file(task, text["file"], ("perplexity", text["model"]["overall"]["perplexity"]), name=name)
    if "choices" in card.measures:
        choices = card.measures["choices"]
        accuracy = choices["model"]["overall"]["accuracy"]
        yield _of_file(task, choices["file"], ("accuracy", accuracy), name="accuracy")
    # Some questions of a task are a trial, and not a result to compare with those of others.
    if "tasks" in card.measures and "limit" not in card.measures["tasks"]["settings"]:
        yield from _of_tasks(task, card.measures["tasks"]["model"]["tasks"])


def _of_file(task: str, file: File, found: tuple[str, float], *, name: str) -> EvalResult:
    metric, value = found
    return EvalResult(
        task_type=task,
        dataset_type=file["name"],
        dataset_name=file["name"],
        dataset_args={"sha256": file["sha256"]},
        metric_type=metric,
        metric_value=round(value, 4),
        metric_name=name,
    )


def _of_tasks(task: str, tasks: Mapping[str, Mapping[str, float | None]]) -> Iterator[EvalResult]:
    for name, row in tasks.items():
        dataset, config, split = DATASETS.get(name, (name, None, None))
        for metric, value in row.items():
            if metric in METRICS and value is not None:
                yield EvalResult(
                    task_type=task,
                    dataset_type=dataset,
                    dataset_name=name,
                    dataset_config=config,
                    dataset_split=split,
                    metric_type=METRICS[metric],
                    metric_name=metric,
                    metric_value=round(value, 4),
                )


def benchmark_entries(card: CardData) -> list[EvalResultEntry]:
    """Entries of ``.eval_results`` for the leaderboards of the Hub; usually none."""
    if "tasks" not in card.measures or "limit" in card.measures["tasks"]["settings"]:
        return []
    measure = card.measures["tasks"]
    tasks = measure["model"]["tasks"]
    return [
        EvalResultEntry(
            dataset_id=dataset,
            task_id=task_id,
            value=round(100 * accuracy, 2),
            notes=f"zero-shot, choices scored by log-likelihood, lm-eval {measure['versions']['lm_eval']}",
        )
        for task, (dataset, task_id) in BENCHMARKS.items()
        if (accuracy := tasks.get(task, {}).get("acc")) is not None
    ]
