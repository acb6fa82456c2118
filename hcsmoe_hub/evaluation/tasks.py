"""Published tasks, run by lm-eval, an optional dependency."""

import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.evaluation.scorer import Scorer
from hcsmoe_hub.evaluation.tokens import Tokens

# The zero-shot tasks of the tables in HC-SMoE (arXiv 2410.08589).
GROUPS: Mapping[str, tuple[str, ...]] = {
    "hc-smoe": ("arc_challenge", "arc_easy", "boolq", "hellaswag", "mmlu", "openbookqa", "rte", "winogrande")
}
TASK_FILES = (".yaml", ".yml")


def check_installed() -> None:
    """Checks that lm-eval is installed; does not import it.

    Raises:
        PlanError: If it is not.
    """
    if find_spec("lm_eval") is None:
        raise PlanError("`tasks` runs lm-eval, which is not installed.", hint="pip install 'hcsmoe[eval]'")


def find_tasks(wanted: Sequence[str]) -> tuple[Any, list[str]]:
    """Finds tasks by name, group, file or folder.

    Args:
        wanted: ``hc-smoe``, names of lm-eval, ``.yaml`` files, or folders of them.

    Returns:
        The task manager that knows them, and their names.

    Raises:
        PlanError: If lm-eval is missing, or one of them is unknown.
    """
    check_installed()
    from lm_eval.tasks import TaskManager

    names: list[str] = []
    folders: list[Path] = []
    for word in wanted:
        path = Path(word).expanduser()
        if path.suffix in TASK_FILES or path.is_dir():
            names += _tasks_of(path)
            folders.append((path if path.is_dir() else path.parent).resolve())
        else:
            names += GROUPS.get(word, (word,))
    unique = list(dict.fromkeys(names))
    # Reading lm-eval's thousands of task files takes a while, and is not needed for the user's own tasks.
    local = TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)
    if set(unique) <= set(local.all_tasks):
        return local, unique
    manager = TaskManager(include_path=[str(folder) for folder in folders])
    for name in unique:
        if name not in manager.all_tasks:
            near = get_close_matches(name, [*GROUPS, *manager.all_tasks], n=1)
            raise PlanError(
                f"there is no task {name!r}.",
                hint=f"use {near[0]!r}, or pass a task file" if near else "see 'lm-eval ls tasks', or pass a task file",
            )
    return manager, unique


def _tasks_of(path: Path) -> list[str]:
    """Names of the tasks that a file, or a folder of files, defines."""
    from lm_eval.tasks import TaskManager

    if not path.exists():
        raise PlanError(f"there is no task file {path}.", hint="check the path")
    folder = path if path.is_dir() else path.parent
    index = TaskManager(include_path=str(folder), include_defaults=False).task_index
    # A tag is only another name for tasks in the folder.
    entries = {name: entry.yaml_path for name, entry in index.items() if entry.yaml_path is not None}
    names = [name for name, file in entries.items() if path.is_dir() or file.resolve() == path.resolve()]
    if not names:
        raise PlanError(f"{path} does not define a task.", hint="add 'task: NAME' to the file")
    return names


def measure_tasks(
    manager: Any, names: Sequence[str], tokens: Tokens, scorer: Scorer, *, limit: int | None = None
) -> dict[str, Any]:
    """Runs tasks zero-shot, or with the number of examples that a task itself specifies.

    Args:
        manager: The task manager from ``find_tasks``.
        names: The task names from ``find_tasks``.
        tokens: Tokenizer of the model.
        scorer: The model to measure.
        limit: Only the first so many questions of every task; ``None`` for all.

    Returns:
        ``{"tasks": {name: {metric: value, metric_stderr: value or None}}, "average": mean of acc over the tasks}``;
        the average is ``None`` if a task has no acc.

    Raises:
        PlanError: If the data of a task cannot be loaded, or its type is not supported.
    """
    from lm_eval import simple_evaluate

    from hcsmoe_hub.evaluation.lm_eval_model import ScorerLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = ScorerLM(scorer, tokens)
    try:
        found: Any = simple_evaluate(
            model=model, tasks=list(names), task_manager=manager, log_samples=False, limit=limit
        )
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PlanError(
            f"lm-eval cannot run {', '.join(names)}: {reason}",
            hint="check the task files, and that their data is local or can be downloaded",
        ) from error
    rows = found["results"] | found.get("groups", {})
    tasks = {name: _metrics(rows[name]) for name in names}
    accuracies = [accuracy for row in tasks.values() if (accuracy := row.get("acc")) is not None]
    return {"tasks": tasks, "average": fmean(accuracies) if len(accuracies) == len(tasks) else None}


def _metrics(row: Mapping[str, Any]) -> dict[str, float | None]:
    """Metrics without the filter name that lm-eval appends; ``None`` for a standard error that it does not compute."""
    found: dict[str, float | None] = {}
    for key, value in row.items():
        metric, _, chosen = key.partition(",")
        if chosen and isinstance(value, int | float):
            found.setdefault(metric, float(value))
        elif chosen and metric.endswith("_stderr"):
            found.setdefault(metric, None)
    return found
