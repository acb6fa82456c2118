"""Runs an evaluation from start to end: check, read, load, measure, write."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.evaluation.choices import measure_choices
from hcsmoe_hub.evaluation.cost import CostRun, cost_steps, measure_cost
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
from hcsmoe_hub.machine.accelerator import is_host
from hcsmoe_hub.machine.device import resolve_device
from hcsmoe_hub.machine.out_of_memory import explaining
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
    cost = options.cost and options.cost.fitting({each.source.label: each.max_positions for each in checkpoints})
    inputs = _prepare(checkpoints, options)
    start = time.perf_counter()
    steps = 0 if inputs is None else inputs.steps(len(checkpoints))
    steps += 0 if cost is None else cost_steps(cost, len(checkpoints))
    listener(StageStarted(Stage.EVALUATE, steps))
    measures: dict[str, Measure] = {}
    with explaining(device, where=lambda: "while the checkpoint ran", helps=lambda: _savings(options, device)):
        if inputs is not None:
            measures |= _run(checkpoints, inputs, options, device, listener)
        if cost is not None:
            run = CostRun(
                options=cost,
                device=device,
                token=token,
                cache_dir=cache_dir,
                emit=listener,
                advance=lambda: listener(StageAdvanced(Stage.EVALUATE)),
            )
            measures["cost"] = measure_cost(checkpoints, run)
    names = [checkpoint.describe() for checkpoint in checkpoints]
    for measure in measures.values():
        measure["settings"] = {"dtype": "float32", "device": device.type, **measure["settings"]}
        measure["base_model"] = names[1] if len(names) > 1 else None
        measure["versions"] = {**installed_versions(), **measure.get("versions", {})}
    document = merge_results(earlier, names[0], measures)
    write_results(output, document)
    listener(StageFinished(Stage.EVALUATE, time.perf_counter() - start))
    return document, output


def _prepare(checkpoints: Sequence[Checkpoint], options: EvaluateOptions) -> Inputs | None:
    """Checks that everything asked for can be measured; the inputs of what is measured on text, if anything is."""
    model = checkpoints[0]
    if not options.reads_text:
        return None
    inputs = prepare_inputs(options, model)
    for other in checkpoints[1:]:
        check_comparable(model, other, inputs)
    return inputs


def _savings(options: EvaluateOptions, device: torch.device) -> list[str]:
    """What takes less memory than an evaluation, as parts of a sentence."""
    if not options.reads_text:
        found = ["smaller `batch_sizes`", "a smaller `prompt_tokens`"]
    else:
        found = [] if options.stream else ["`stream`"]
        found.append("a smaller `window`")
    return found if is_host(device) else [*found, "`device='cpu'`"]


def _run(
    checkpoints: Sequence[Checkpoint],
    inputs: Inputs,
    options: EvaluateOptions,
    device: torch.device,
    listener: Listener,
) -> dict[str, Measure]:
    """Loads the checkpoints, or streams their layers, and runs all measures."""
    scorers = make_scorers(checkpoints, device, stream=options.stream, emit=listener)
    if inputs.prompts and isinstance(scorers[0], StreamedScorer):
        listener(Warned(f"layers are streamed, so each of {CONTINUATION_TOKENS} generated tokens reads all weights."))
    return _measure(inputs, scorers, options, lambda: listener(StageAdvanced(Stage.EVALUATE)))


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
        settings = {} if inputs.has_encoder else {"prompt_tokens": PROMPT_TOKENS}
        settings |= {"continuation_tokens": CONTINUATION_TOKENS}
        measure = partial(measure_loops, inputs.prompts, last=inputs.tokens.last, begins=inputs.begins)
        found["loops"] = {"file": inputs.text_file, "settings": settings, **_measure_each(scorers, measure, advance)}
    if inputs.pairs:
        measure = partial(measure_choices, inputs.items, inputs.pairs, advance=advance)
        found["choices"] = {
            "file": inputs.choice_file,
            "settings": _first_token(inputs),
            **_measure_each(scorers, measure),
        }
    if inputs.task_names:
        measure = partial(measure_tasks, inputs.task_manager, inputs.task_names, inputs.tokens, limit=options.limit)
        versions = {"lm_eval": version("lm_eval")}
        settings = {"tasks": inputs.task_names} | ({} if options.limit is None else {"limit": options.limit})
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
    """The token that every text begins with; targets of sources begin as the tokenizer has them."""
    if inputs.has_encoder:
        return {"predicts": "targets"}
    return {"first_token": inputs.tokens.tokenizer.convert_ids_to_tokens(inputs.tokens.first)}
