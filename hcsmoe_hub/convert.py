"""The whole story: calibrate, observe, convert (cluster, merge or prune, refit), measure, finish, push.

Importing this module is cheap; torch and transformers are imported when a conversion begins.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hcsmoe_hub.errors import OutputError
from hcsmoe_hub.events import EventLog, Listener, Stage, StageAdvanced, Warned, ignore
from hcsmoe_hub.options import ConvertOptions
from hcsmoe_hub.report import FIGURE_FILE, SINGULAR_VALUES_FILE, ConversionReport, ModelRefitReport

if TYPE_CHECKING:
    from hcsmoe_hub.calibration.calibration_set import CalibrationSet
    from hcsmoe_hub.checkpoint.source import Source
    from hcsmoe_hub.pipeline.held_out import HeldOut
    from hcsmoe_hub.pipeline.run import Converted
    from hcsmoe_hub.planning.conversion_plan import ConversionPlan
    from hcsmoe_hub.publishing.delivery import Delivery
    from hcsmoe_hub.result.make_report import Outcome


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
        What was done: the content of ``hcsmoe.json``, and where the result was pushed to.

    Raises:
        HcsmoeError: For every known failure. Nothing is left that looks finished; if nothing but a push has failed, the
            result stays.
    """
    planned = plan(source, options, revision=revision, token=token, cache_dir=cache_dir)
    return execute(planned, token=token, listener=listener)


def plan(
    source: "str | Path | Source",
    options: ConvertOptions,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
) -> "ConversionPlan":
    """Plans a conversion from the source's config and headers; reads no weights and writes nothing.

    Args:
        source: Local folder, Hub repository id, or an opened source.
        options: What to do.
        revision: Branch, tag or commit of a repository.
        token: Hub token; ``None`` uses the stored login.
        cache_dir: Hub cache; ``None`` uses the default one.

    Returns:
        What ``execute`` will do, and what it needs; its warnings say what this machine has too little of.

    Raises:
        HcsmoeError: Every refusal of a conversion happens here, but for too little disk or memory.
    """
    from hcsmoe_hub.checkpoint.source import Source
    from hcsmoe_hub.hub.open import open_source
    from hcsmoe_hub.machine.device import resolve_device
    from hcsmoe_hub.planning.like import open_like
    from hcsmoe_hub.planning.make import make_plan

    device = resolve_device(options.device)
    if options.push is not None:
        from hcsmoe_hub.hub.repository import check_repo_id

        check_repo_id(options.push.repo_id)
    if not isinstance(source, Source):
        source = open_source(str(source), revision=revision, token=token, cache_dir=cache_dir)
    like = None if options.like is None else open_like(options.like, token=token, cache_dir=cache_dir)
    return make_plan(source, options, on_device=device.type != "cpu", like=like)


def execute(plan: "ConversionPlan", *, token: str | None = None, listener: Listener = ignore) -> ConversionReport:
    """Carries out a plan.

    Args:
        plan: What to do.
        token: Hub token for a push; ``None`` uses the stored login.
        listener: Called with every event, from several threads if the result is pushed.

    Raises:
        OutputError: If the download or the result does not fit on its disk.
        PlanError: If the conversion needs more memory than is available, and ``max_memory_bytes`` does not allow it.
        PushError: If the result cannot be pushed. Unless its shards were to be deleted, it stays where it is.
        HcsmoeError: If calibration text, a download or the disk fails; everything written so far is removed.
    """
    from hcsmoe_hub.planning.room import check_room
    from hcsmoe_hub.result.folder import claim_output
    from hcsmoe_hub.result.make_report import describe_making

    check_room(plan)
    log = EventLog(listener, plan.warnings)
    with ExitStack() as stack:
        calibration = _calibrate(plan, log)
        making = describe_making(plan, calibration, log.emit)
        delivery = _open_delivery(plan, making, token=token, listener=listener)
        plan = _observe(plan, calibration, stack, log)
        making = {**making, "experts": plan.expert_counts}
        claim = stack.enter_context(claim_output(plan))
        if delivery is not None:
            stack.enter_context(delivery)
        report, result = _convert(plan, calibration, making, delivery, log)
        claim.stays = not plan.sends_away
        claim.card = _finish(plan, log.emit)
        return report if delivery is None else _push(plan, report, delivery, result, log)


def _calibrate(plan: "ConversionPlan", log: EventLog) -> "CalibrationSet | None":
    """Reads the calibration set; ``None`` if statistics of an earlier version take its place."""
    from hcsmoe_hub.pipeline.refit_model import check_text
    from hcsmoe_hub.pipeline.run import load_tokens

    if plan.statistics is not None:
        found = plan.statistics.text() if plan.statistics.has_text else None
    else:
        with log.timed(Stage.CALIBRATION, 1):
            found = load_tokens(plan, log.emit)
    if plan.trains_model and found is not None:
        check_text(plan, found)
    return found


def _open_delivery(
    plan: "ConversionPlan", making: Mapping[str, Any], *, token: str | None, listener: Listener
) -> "Delivery | None":
    """Finds or makes the repository that the result goes to; ``None`` if it is not pushed."""
    from hcsmoe_hub.publishing.result import open_delivery

    push = plan.options.push
    return None if push is None else open_delivery(plan, push, making, token=token, listener=listener)


def _observe(
    plan: "ConversionPlan", calibration: "CalibrationSet | None", stack: ExitStack, log: EventLog
) -> "ConversionPlan":
    """Makes a plan final whose budget or shape depends on statistics that nobody has collected yet."""
    from hcsmoe_hub.options import Budget
    from hcsmoe_hub.pipeline.run import choose_from_statistics, observe

    if plan.is_final:
        return plan
    if plan.statistics is not None:
        with log.timed(Stage.OBSERVE, len(plan.model.skeleton.layers)):
            return choose_from_statistics(plan, log.emit)
    assert calibration is not None, "without statistics the model runs"
    file = plan.options.statistics
    if file is None and plan.recipe.budget is not Budget.UNIFORM:
        file = Path(stack.enter_context(TemporaryDirectory(prefix="hcsmoe-"))) / "statistics"
    with log.timed(Stage.OBSERVE, len(plan.model.skeleton.layers)):
        return observe(plan, calibration, file, log.emit)


def _convert(
    plan: "ConversionPlan",
    calibration: "CalibrationSet | None",
    making: Mapping[str, Any],
    delivery: "Delivery | None",
    log: EventLog,
) -> "tuple[ConversionReport, Source]":
    """Converts with a final plan: from its statistics if it has some, otherwise on calibration tokens."""
    from hcsmoe_hub.machine.device import peak_memory, resolve_device
    from hcsmoe_hub.pipeline.run import run
    from hcsmoe_hub.result.figure import draw
    from hcsmoe_hub.result.folder import open_writer, write_neurons, write_result
    from hcsmoe_hub.result.make_report import make_report
    from hcsmoe_hub.result.spectra_figure import draw_spectra
    from hcsmoe_hub.result.verify import check_structure

    # What will change again is sent when it no longer does.
    with open_writer(plan, None if plan.trains_model else delivery) as writer:
        with log.timed(Stage.CONVERT, len(plan.model.skeleton.layers)):
            converted = run(plan, writer, calibration, log.emit)
        trained = None
        if plan.trains_model and calibration is not None:
            trained, held_out = _train(plan, calibration, delivery, log)
            converted = replace(converted, held_out=held_out)
        outcome = _measure(plan, calibration, converted, log)
        peak = peak_memory(resolve_device(plan.options.device))
        report = make_report(plan, making, outcome, warnings=log.warnings, seconds=log.seconds, peak=peak)
        report = replace(report, refit_model=trained, neurons=write_neurons(plan, converted.origins))
        if converted.pictures:
            draw(converted.pictures, plan.output / FIGURE_FILE, title=plan.model.source.name)
        if converted.spectra:
            draw_spectra(converted.spectra, plan.output / SINGULAR_VALUES_FILE, title=plan.model.source.name)
        write_result(plan, writer, report)
        if delivery is not None:
            delivery.wait_for_space()
        with log.timed(Stage.VERIFY, 1):
            result = check_structure(plan.output, sent={} if delivery is None else delivery.sent).source
    return report, result


def _measure(
    plan: "ConversionPlan", calibration: "CalibrationSet | None", converted: "Converted", log: EventLog
) -> "Outcome":
    """Measures what a conversion cost on the held-out sequences that have run through its layers."""
    from hcsmoe_hub.pipeline.held_out import NOT_FINITE, why_not_measured
    from hcsmoe_hub.result.make_report import Outcome

    held_out, reason, measured = converted.held_out, why_not_measured(plan, calibration), None
    if held_out is not None:
        with log.timed(Stage.MEASURE, len(held_out.domains)):
            measured = held_out.measure(lambda: log.emit(StageAdvanced(Stage.MEASURE)))
        reason = NOT_FINITE if measured is None else None
    return Outcome(layers=converted.layers, measured=measured, not_measured=reason)


def _train(
    plan: "ConversionPlan", calibration: "CalibrationSet", delivery: "Delivery | None", log: EventLog
) -> "tuple[ModelRefitReport, HeldOut | None]":
    """Trains the whole reduced model, and sends its shards; it has no config yet."""
    from hcsmoe_hub.pipeline.refit_model import refit_model, training_steps

    with log.timed(Stage.REFIT, training_steps(calibration)):
        found = refit_model(plan, calibration, log.emit)
    if delivery is not None:
        for shard in plan.shards.files:
            delivery.take(plan.output / shard)
    return found


def _finish(plan: "ConversionPlan", emit: Listener) -> Path | None:
    """Writes the model card, unless a person's own would be lost: that one is not part of the result."""
    from hcsmoe_hub.model_cards import write_card

    push = plan.options.push
    try:
        card = write_card(plan.output, None if push is None else push.repo_id)
        # They matter only to those who publish.
        for message in card.warnings if push is not None else ():
            emit(Warned(message))
    except OutputError as error:
        emit(Warned(f"{error.message} It stays as it is; 'hcsmoe card {plan.output} --overwrite' replaces it."))
        return None
    return card.path


def _push(
    plan: "ConversionPlan", report: ConversionReport, delivery: "Delivery", result: "Source", log: EventLog
) -> ConversionReport:
    """Makes the result visible on the Hub."""
    from hcsmoe_hub.publishing.result import push_result

    assert plan.options.push is not None, "there is a delivery for a push only"
    with log.timed(Stage.PUSH, 1):
        return replace(report, pushed=push_result(plan, plan.options.push, delivery, result))
