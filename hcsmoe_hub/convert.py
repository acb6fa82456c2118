"""The whole story: plan, stream (observe, cluster, merge, route), write, verify.

Importing this module is cheap; torch and transformers are imported when a conversion begins.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hcsmoe_hub.events import Listener, Stage, StageFinished, StageStarted, Warned, ignore
from hcsmoe_hub.options import ConvertOptions
from hcsmoe_hub.report import FIGURE_FILE, ConversionReport, LayerReport

if TYPE_CHECKING:
    from torch import Tensor

    from hcsmoe_hub.checkpoint.source import Source
    from hcsmoe_hub.plan import ConversionPlan


def convert(
    source: "str | Path | Source",
    options: ConvertOptions,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    listener: Listener = ignore,
) -> ConversionReport:
    """Converts a checkpoint to fewer experts and writes the result.

    Args:
        source: Local folder, Hub repository id, or an opened source.
        options: What to do.
        revision: Branch, tag or commit of a repository.
        token: Hub token; ``None`` uses the stored login.
        cache_dir: Hub cache; ``None`` uses the default one.
        listener: Called with every event.

    Returns:
        What was done; the same as ``hcsmoe.json`` in the output folder.

    Raises:
        HcsmoeError: For every known failure. Nothing is left that looks finished.
    """
    plan = plan_conversion(source, options, revision=revision, token=token, cache_dir=cache_dir)
    return execute(plan, listener=listener)


def plan_conversion(
    source: "str | Path | Source",
    options: ConvertOptions,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
) -> "ConversionPlan":
    """Plans a conversion from the source's config and headers; reads no weights and writes nothing.

    Raises:
        HcsmoeError: Every refusal of a conversion happens here.
    """
    from hcsmoe_hub.checkpoint.source import Source, open_source
    from hcsmoe_hub.device import resolve_device
    from hcsmoe_hub.plan import make_plan

    device = resolve_device(options.device)
    if not isinstance(source, Source):
        source = open_source(str(source), revision=revision, token=token, cache_dir=cache_dir)
    return make_plan(source, options, on_device=device.type != "cpu")


def execute(plan: "ConversionPlan", *, listener: Listener = ignore) -> ConversionReport:
    """Carries out a plan.

    Raises:
        HcsmoeError: If calibration text, a download or the disk fails; everything written so far is removed.
    """
    from hcsmoe_hub.run import load_tokens, observe

    seconds: dict[str, float] = {}
    warnings = list(plan.warnings)

    def emit(event: Any) -> None:
        if isinstance(event, Warned):
            warnings.append(event.message)
        listener(event)

    for message in plan.warnings:
        listener(Warned(message))
    with TemporaryDirectory(prefix="hcsmoe-") as scratch:
        token_ids = None
        if plan.statistics is None:
            with _timed(Stage.CALIBRATION, 1, emit, seconds):
                token_ids = load_tokens(plan, emit)
        if not plan.is_final:
            assert token_ids is not None, "statistics make every plan final"
            with _timed(Stage.OBSERVE, len(plan.model.skeleton.layers), emit, seconds):
                plan = observe(plan, token_ids, plan.options.statistics or Path(scratch) / "statistics", emit)
        return _convert(plan, token_ids, warnings, seconds, emit)


def _convert(
    plan: "ConversionPlan",
    token_ids: "Tensor | None",
    warnings: list[str],
    seconds: dict[str, float],
    emit: Listener,
) -> ConversionReport:
    """Converts with a final plan: from its statistics if it has some, otherwise on calibration tokens."""
    from hcsmoe_hub.checkpoint.verify import check_structure
    from hcsmoe_hub.figure import draw
    from hcsmoe_hub.output import claim_output, write_result
    from hcsmoe_hub.run import run

    with claim_output(plan) as writer:
        with _timed(Stage.CONVERT, len(plan.model.skeleton.layers), emit, seconds):
            layers, pictures, peak = run(plan, writer, token_ids, emit)
        report = _report(plan, token_ids, layers, warnings, seconds, peak)
        if pictures:
            draw(pictures, plan.output / FIGURE_FILE, title=plan.model.source.name)
        write_result(plan, writer, report)
        with _timed(Stage.VERIFY, 1, emit, seconds):
            check_structure(plan.output)
    return report


@contextmanager
def _timed(stage: Stage, total: int, emit: Listener, seconds: dict[str, float]) -> Iterator[None]:
    emit(StageStarted(stage, total))
    start = time.perf_counter()
    yield
    seconds[stage.value] = round(time.perf_counter() - start, 3)
    emit(StageFinished(stage, seconds[stage.value]))


def _report(
    plan: "ConversionPlan",
    token_ids: "Tensor | None",
    layers: list[LayerReport],
    warnings: list[str],
    seconds: dict[str, float],
    peak: dict[str, int],
) -> ConversionReport:
    from hcsmoe_hub.checkpoint.tensors import total_bytes
    from hcsmoe_hub.statistics_file import calibration_record
    from hcsmoe_hub.versions import installed_versions, tool

    source, before, after = plan.model.source, plan.model.settings, plan.settings
    name = {"repo_id": source.repo_id} if source.repo_id is not None else {"path": str(source.path)}
    return ConversionReport(
        tool=tool(),
        source={**name, "revision": source.revision, "model_type": source.config["model_type"]},
        experts={
            "before": before.experts,
            "after": plan.options.experts,
            "per_token_before": before.experts_per_token,
            "per_token_after": after.experts_per_token,
            "moe_layers": len(plan.model.blocks),
        },
        parameters={"before": plan.model.parameters, "after": plan.parameters_after},
        weights_bytes={
            "before": total_bytes(source.tensors.values()),
            "after": total_bytes(plan.layout.tensors.values()),
        },
        method=plan.recipe.as_dict(),
        calibration=calibration_record(plan, token_ids),
        layers=layers,
        dropped_tensors=plan.account.dropped,
        warnings=warnings,
        timings_seconds=seconds,
        peak_memory_bytes=peak,
        versions=installed_versions(),
    )
