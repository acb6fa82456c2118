"""The whole story: plan, stream (observe, cluster, merge, route), write, verify.

Importing this module is cheap; torch and transformers are imported when a conversion begins.
"""

import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hcsmoe_hub.errors import OutputError, SourceError
from hcsmoe_hub.events import Listener, Stage, StageFinished, StageStarted, Warned, ignore
from hcsmoe_hub.options import ConvertOptions
from hcsmoe_hub.report import FIGURE_FILE, ConversionReport, LayerReport, describe_source, without_places

if TYPE_CHECKING:
    from torch import Tensor

    from hcsmoe_hub.checkpoint.source import Source
    from hcsmoe_hub.plan import ConversionPlan
    from hcsmoe_hub.publishing.delivery import Delivery
    from hcsmoe_hub.publishing.options import Pushed


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
        What was done: ``hcsmoe.json`` of the result, and where it was pushed to.

    Raises:
        HcsmoeError: For every known failure. Nothing is left that looks finished; if nothing but a push has failed, the
            result stays.
    """
    plan = plan_conversion(source, options, revision=revision, token=token, cache_dir=cache_dir)
    return execute(plan, token=token, listener=listener)


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
    if options.push is not None:
        from hcsmoe_hub.publishing.hub import check_repo_id

        check_repo_id(options.push.repo_id)
    if not isinstance(source, Source):
        source = open_source(str(source), revision=revision, token=token, cache_dir=cache_dir)
    return make_plan(source, options, on_device=device.type != "cpu")


def execute(plan: "ConversionPlan", *, token: str | None = None, listener: Listener = ignore) -> ConversionReport:
    """Carries out a plan.

    Args:
        plan: What to do.
        token: Hub token for a push; ``None`` uses the stored login.
        listener: Called with every event, from several threads if the result is pushed.

    Raises:
        PushError: If the result cannot be pushed. Unless its shards were to be deleted, it stays where it is.
        HcsmoeError: If calibration text, a download or the disk fails; everything written so far is removed.
    """
    from hcsmoe_hub.output import claim_output
    from hcsmoe_hub.run import load_tokens, observe

    seconds: dict[str, float] = {}
    warnings = list(plan.warnings)

    def emit(event: Any) -> None:
        if isinstance(event, Warned):
            warnings.append(event.message)
        listener(event)

    for message in plan.warnings:
        listener(Warned(message))
    with ExitStack() as stack:
        scratch = stack.enter_context(TemporaryDirectory(prefix="hcsmoe-"))
        token_ids = None
        if plan.statistics is None:
            with _timed(Stage.CALIBRATION, 1, emit, seconds):
                token_ids = load_tokens(plan, emit)
        delivery = _open_delivery(plan, token_ids, token, listener)
        if delivery is not None:
            stack.enter_context(delivery)
        if not plan.is_final:
            assert token_ids is not None, "statistics make every plan final"
            with _timed(Stage.OBSERVE, len(plan.model.skeleton.layers), emit, seconds):
                plan = observe(plan, token_ids, plan.options.statistics or Path(scratch) / "statistics", emit)
        with claim_output(plan) as claim:
            report, result = _convert(plan, token_ids, delivery, warnings, seconds, emit)
            claim.stays = not plan.sends_away
            claim.card = _write_card(plan, emit)
            if delivery is None:
                return report
            with _timed(Stage.PUSH, 1, emit, seconds):
                return replace(report, pushed=_push(plan, delivery, result))


def _convert(
    plan: "ConversionPlan",
    token_ids: "Tensor | None",
    delivery: "Delivery | None",
    warnings: list[str],
    seconds: dict[str, float],
    emit: Listener,
) -> "tuple[ConversionReport, Source]":
    """Converts with a final plan: from its statistics if it has some, otherwise on calibration tokens."""
    from hcsmoe_hub.checkpoint.verify import check_structure
    from hcsmoe_hub.figure import draw
    from hcsmoe_hub.output import write_result, writing
    from hcsmoe_hub.run import run

    with writing(plan, delivery) as writer:
        with _timed(Stage.CONVERT, len(plan.model.skeleton.layers), emit, seconds):
            layers, pictures, peak = run(plan, writer, token_ids, emit)
        report = _report(plan, token_ids, layers, warnings, seconds, peak, emit)
        if pictures:
            draw(pictures, plan.output / FIGURE_FILE, title=plan.model.source.name)
        write_result(plan, writer, report)
        if delivery is not None:
            delivery.make_room()
        with _timed(Stage.VERIFY, 1, emit, seconds):
            result = check_structure(plan.output, sent={} if delivery is None else delivery.sent).source
    return report, result


def _open_delivery(
    plan: "ConversionPlan", token_ids: "Tensor | None", token: str | None, listener: Listener
) -> "Delivery | None":
    """Finds or makes the repository that the result goes to, if it goes to one."""
    if plan.options.push is None:
        return None
    from hcsmoe_hub.publishing.delivery import Delivery
    from hcsmoe_hub.publishing.publisher import Publisher

    publisher = Publisher(plan.output, plan.options.push, token=token, listener=listener)
    publisher.open(recipe=_making(plan, token_ids))
    # A result of one shard is on the disk as a whole in any case.
    return Delivery(publisher, deletes=plan.sends_away and len(plan.layout.shards) > 1, listener=listener)


def _write_card(plan: "ConversionPlan", emit: Listener) -> Path | None:
    """Writes the model card, unless a person's own would be lost: that one is no part of the result."""
    from hcsmoe_hub.model_cards import write_card

    push = plan.options.push
    try:
        card = write_card(plan.output, None if push is None else push.repo_id)
        # What these say is of interest to whoever publishes.
        for message in card.warnings if push is not None else ():
            emit(Warned(message))
    except OutputError as error:
        emit(Warned(f"{error.message} It stays as it is; 'hcsmoe card {plan.output} --overwrite' replaces it."))
        return None
    return card.path


def _push(plan: "ConversionPlan", delivery: "Delivery", result: "Source") -> "Pushed":
    """Commits what was sent.

    Raises:
        PushError: If that fails.
    """
    from hcsmoe_hub.publishing.failures import PushError
    from hcsmoe_hub.publishing.files import checkpoint_files

    try:
        return delivery.commit(checkpoint_files(result))
    except PushError as error:
        if plan.sends_away:
            raise
        repo_id = plan.options.push.repo_id if plan.options.push is not None else ""
        raise PushError(
            f"{error.message} The result itself is complete: {plan.output}.",
            hint=f"push it with 'hcsmoe push {shlex.quote(str(plan.output))} {repo_id}'; first: {error.hint}",
        ) from error


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
    emit: Listener,
) -> ConversionReport:
    from hcsmoe_hub.checkpoint.tensors import total_bytes
    from hcsmoe_hub.statistics_file import dataset_name
    from hcsmoe_hub.versions import installed_versions

    source, before, after = plan.model.source, plan.model.settings, plan.settings
    making = _making(plan, token_ids, emit)
    dataset = plan.options.calibration.dataset
    names = {str(source.path): source.name, dataset: dataset_name(dataset)}
    total = {"before": plan.model.parameters, "after": plan.parameters_after}
    idle = {
        "before": _idle_parameters(plan, plan.model.skeleton.state, before.experts_per_token),
        "after": _idle_parameters(plan, plan.state, after.experts_per_token),
    }
    return ConversionReport(
        **making,
        parameters=total,
        active_parameters={when: total[when] - idle[when] for when in total},
        weights_bytes={
            "before": total_bytes(source.tensors.values()),
            "after": total_bytes(plan.layout.tensors.values()),
        },
        layers=layers,
        dropped_tensors=plan.account.dropped,
        warnings=[without_places(message, names) for message in warnings],
        timings_seconds=seconds,
        peak_memory_bytes=peak,
        versions=installed_versions(),
    )


def _idle_parameters(plan: "ConversionPlan", state: "Mapping[str, Tensor]", per_token: int) -> int:
    """Parameters of the routed experts that a token does not visit, in all layers."""
    idle = 0
    for expert in (expert for block in plan.model.blocks for expert in block.experts):
        tensor = state[expert.name]
        rows = tensor.shape[expert.dim] - expert.extra_rows - per_token * expert.rows_per_expert
        idle += max(rows, 0) * (tensor.numel() // tensor.shape[expert.dim])
    return idle


def _inherited(source: "Source", emit: Listener) -> dict[str, Any]:
    """What the card of a source says of licence and use; a card that cannot be read is no reason to lose a result."""
    from hcsmoe_hub.inherited import inherit_from

    try:
        return inherit_from(source)
    except SourceError as error:
        emit(Warned(f"{error.message} The licence of the source is not recorded."))
        return {"gated": bool(source.gated)}


def _making(plan: "ConversionPlan", token_ids: "Tensor | None", emit: Listener = ignore) -> dict[str, Any]:
    """The part of a report that is known before the conversion, and that two conversions with the same result share."""
    from hcsmoe_hub.statistics_file import calibration_record
    from hcsmoe_hub.versions import tool

    source, before, after = plan.model.source, plan.model.settings, plan.settings
    described = {**describe_source(source), "model_type": source.config["model_type"]}
    return {
        "tool": tool(),
        "source": {**described, **_inherited(source, emit)},
        "experts": {
            "before": before.experts,
            "after": plan.options.experts,
            "per_token_before": before.experts_per_token,
            "per_token_after": after.experts_per_token,
            "moe_layers": len(plan.model.blocks),
        },
        "method": plan.recipe.as_dict(),
        "calibration": calibration_record(plan, token_ids),
    }
