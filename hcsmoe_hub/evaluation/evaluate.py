"""Runs an evaluation from start to end: check, read, load, measure, write."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.evaluation.choices import measure_choices
from hcsmoe_hub.evaluation.inputs import Inputs, check_comparable, prepare_inputs
from hcsmoe_hub.evaluation.loops import CONTINUATION_TOKENS, PROMPT_TOKENS, measure_loops
from hcsmoe_hub.evaluation.options import EvaluateOptions
from hcsmoe_hub.evaluation.perplexity import measure_text
from hcsmoe_hub.evaluation.results import Document, merge_results, read_results, result_path, write_results
from hcsmoe_hub.evaluation.scorer import Scorer
from hcsmoe_hub.evaluation.scorers import StreamedScorer, make_scorers
from hcsmoe_hub.evaluation.tasks import measure_tasks
from hcsmoe_hub.events import Listener, Stage, StageAdvanced, StageFinished, StageStarted, Warned, ignore
from hcsmoe_hub.hub.open import open_source
from hcsmoe_hub.machine.device import resolve_device
from hcsmoe_hub.machine.versions import installed_versions

Measure = dict[str, Any]


def evaluate(
    path: str | Path,
    options: EvaluateOptions,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    listener: Listener = ignore,
) -> tuple[Document, Path]:
    """Measures a checkpoint, and its base along with it; adds the figures to its result file.

    Args:
        path: Folder, or Hub repository.
        options: What to measure.
        revision: Branch, tag or commit of ``path`` if it is a repository, otherwise of the base.
        token: Hub token; ``None`` uses the stored login.
        cache_dir: Hub cache; ``None`` uses the default one.
        listener: Called with every event.

    Returns:
        The content of the result file, and its path.

    Raises:
        HcsmoeError: For every known failure; the result file is then unchanged.
    """
    options.check()
    device = resolve_device(options.device)
    sources = _open(path, options.base, revision, token=token, cache_dir=cache_dir)
    output = result_path(sources[0], options.output)
    earlier = read_results(output)
    checkpoints = [Checkpoint(source) for source in sources]
    inputs = prepare_inputs(options, checkpoints[0])
    for other in checkpoints[1:]:
        check_comparable(checkpoints[0], other, inputs)
    start = time.perf_counter()
    listener(StageStarted(Stage.EVALUATE, inputs.steps(len(checkpoints))))
    scorers = make_scorers(checkpoints, device, stream=options.stream, emit=listener)
    if inputs.prompts and isinstance(scorers[0], StreamedScorer):
        listener(Warned(f"layers are streamed, so each of {CONTINUATION_TOKENS} generated tokens reads all weights."))
    measures = _measure(inputs, scorers, options, lambda: listener(StageAdvanced(Stage.EVALUATE)))
    names = [checkpoint.describe() for checkpoint in checkpoints]
    for measure in measures.values():
        measure["settings"] |= {"dtype": "float32", "device": device.type}
        measure["base_model"] = names[1] if len(names) > 1 else None
        measure["versions"] = {**installed_versions(), **measure.get("versions", {})}
    document = merge_results(earlier, names[0], measures)
    write_results(output, document)
    listener(StageFinished(Stage.EVALUATE, time.perf_counter() - start))
    return document, output


def _open(
    path: str | Path, base: str | Path | None, revision: str | None, *, token: str | None, cache_dir: Path | None
) -> list[Source]:
    """Opens the checkpoint, and its base if given; ``revision`` applies to the base if the checkpoint is a folder."""
    of_base = base is not None and Path(path).expanduser().is_dir()
    opening = partial(open_source, token=token, cache_dir=cache_dir)
    sources = [opening(str(path), revision=None if of_base else revision)]
    if base is not None:
        sources.append(opening(str(base), revision=revision if of_base else None))
    return sources


def _measure(
    inputs: Inputs, scorers: Sequence[Scorer], options: EvaluateOptions, advance: Callable[[], None]
) -> dict[str, Measure]:
    """Runs all measures; by name: ``file``, ``settings``, ``seconds``, and figures of ``model`` and ``base``."""
    found: dict[str, Measure] = {}
    settings: dict[str, Any]
    if inputs.windows:
        found |= _measure_text(inputs, scorers, window=options.window, advance=advance)
    if inputs.prompts:
        settings = {"prompt_tokens": PROMPT_TOKENS, "continuation_tokens": CONTINUATION_TOKENS}
        measure = partial(measure_loops, inputs.prompts, last=inputs.tokens.last)
        found["loops"] = {"file": inputs.text_file, "settings": settings, **_measure_each(scorers, measure, advance)}
    if inputs.pairs:
        measure = partial(measure_choices, inputs.items, inputs.pairs, advance=advance)
        found["choices"] = {
            "file": inputs.choice_file,
            "settings": _first_token(inputs),
            **_measure_each(scorers, measure),
        }
    if inputs.task_names:
        measure = partial(measure_tasks, inputs.task_manager, inputs.task_names, inputs.tokens)
        versions = {"lm_eval": version("lm_eval")}
        settings = {"tasks": inputs.task_names}
        found["tasks"] = {"settings": settings, "versions": versions, **_measure_each(scorers, measure, advance)}
    return found


def _measure_text(
    inputs: Inputs, scorers: Sequence[Scorer], *, window: int, advance: Callable[[], None]
) -> dict[str, Measure]:
    start = time.perf_counter()
    figures = measure_text(inputs.windows, scorers[0], scorers[1] if len(scorers) > 1 else None, advance=advance)
    agreement = figures.pop("agreement")
    common = {"file": inputs.text_file, "seconds": round(time.perf_counter() - start, 3)}
    found = {"perplexity": {**common, "settings": {"window": window, **_first_token(inputs)}, **figures}}
    if agreement is not None:
        found["agreement"] = {**common, "settings": {"window": window, **_first_token(inputs)}, "model": agreement}
    return found


def _measure_each(
    scorers: Sequence[Scorer], measure: Callable[[Scorer], Measure], advance: Callable[[], None] | None = None
) -> Measure:
    """Figures of the model and then of its base, if given."""
    start = time.perf_counter()
    figures = []
    for scorer in scorers:
        figures.append(measure(scorer))
        if advance is not None:
            advance()
    found = dict(zip(("model", "base"), [*figures, None], strict=False))
    return {"seconds": round(time.perf_counter() - start, 3), **found}


def _first_token(inputs: Inputs) -> dict[str, Any]:
    """The token that every text begins with."""
    return {"first_token": inputs.tokens.tokenizer.convert_ids_to_tokens(inputs.tokens.first)}
