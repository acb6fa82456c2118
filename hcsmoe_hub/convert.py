"""The whole story: calibrate, observe, convert (cluster, merge or prune, refit), measure, finish, push.

Importing this module is cheap; torch and transformers are imported when a conversion begins.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hcsmoe_hub.events import EventLog, Listener, Stage, StageAdvanced, ignore
from hcsmoe_hub.options import ConvertOptions
from hcsmoe_hub.report import FIGURE_FILE, SINGULAR_VALUES_FILE, ConversionReport, ModelRefitReport

if TYPE_CHECKING:
    from hcsmoe_hub.calibration.calibration_set import CalibrationSet
    from hcsmoe_hub.checkpoint.source import Source
    from hcsmoe_hub.pipeline.held_out import HeldOut
    from hcsmoe_hub.pipeline.progress import Progress
    from hcsmoe_hub.pipeline.run import Converted
    from hcsmoe_hub.planning.conversion_plan import ConversionPlan
    from hcsmoe_hub.publishing.delivery import Delivery
    from hcsmoe_hub.publishing.sent import KeptShards
    from hcsmoe_hub.result.claim import Claim
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
    from hcsmoe_hub.pipeline.sharding import check_shareable
    from hcsmoe_hub.planning.like import open_like
    from hcsmoe_hub.planning.make import make_plan
    from hcsmoe_hub.planning.room import device_room

    room = device_room(options.device, options.max_memory)
    if options.push is not None:
        from hcsmoe_hub.hub.repository import check_repo_id

        check_repo_id(options.push.repo_id)
    if not isinstance(source, Source):
        source = open_source(str(source), revision=revision, token=token, cache_dir=cache_dir)
    like = None if options.like is None else open_like(options.like, token=token, cache_dir=cache_dir)
    made = make_plan(source, options, device_room=room, like=like)
    check_shareable(made)
    return made


def execute(plan: "ConversionPlan", *, token: str | None = None, listener: Listener = ignore) -> ConversionReport:
    """Carries out a plan; in a process group of ``torch.distributed``, every rank calls this with the same plan.

    Args:
        plan: What to do.
        token: Hub token for a push; ``None`` uses the stored login.
        listener: Called with every event, from several threads if the result is pushed.

    Raises:
        OutputError: If the download or the result does not fit on its disk.
        PlanError: If the conversion needs more memory than is available, and ``max_memory`` does not allow it.
        OutOfMemoryError: If memory runs out all the same.
        PushError: If the result cannot be pushed. Unless its shards were to be deleted, it stays where it is.
        HcsmoeError: If calibration text, a download or the disk fails. What the same plan goes on from stays in the
            output folder, and anything else is removed.
    """
    from hcsmoe_hub.machine import ranks
    from hcsmoe_hub.machine.device import measuring_memory, resolve_device
    from hcsmoe_hub.machine.out_of_memory import explaining
    from hcsmoe_hub.pipeline.progress import open_progress
    from hcsmoe_hub.pipeline.sharding import check_same_plan, check_shared_folder
    from hcsmoe_hub.planning.memory import savings
    from hcsmoe_hub.planning.room import check_room, refreshed
    from hcsmoe_hub.publishing.ending import finish_earlier, move_result, push_own, write_own_card
    from hcsmoe_hub.publishing.sent import KeptShards, check_sent

    check_same_plan(plan)
    plan = refreshed(plan)
    ranks.alike(lambda: check_room(plan))
    log, device = EventLog(listener, plan.warnings), resolve_device(plan.options.device)
    with ExitStack() as stack:
        claim = _claim(plan, stack, log)
        progress = open_progress(plan, claim, log)
        if ranks.from_first(claim.is_committed):
            # An earlier run was interrupted while it moved or pushed the complete result.
            return ranks.first(lambda: finish_earlier(plan, token, log))
        check_shared_folder(plan.staging)
        stack.enter_context(measuring_memory(device))
        stack.enter_context(explaining(device, where=lambda: log.place, helps=lambda: savings(plan)))
        kept = KeptShards(progress)
        ranks.alike(lambda: check_sent(plan, kept.sent()))
        calibration, making = _prepare(plan, progress, log)
        plan = plan.split_as(calibration)
        delivery = ranks.on_first(lambda: _open_delivery(plan, making, kept, token=token, listener=listener))
        final = _observe(plan, calibration, progress, stack, log)
        making = {**making, "experts": final.expert_counts}
        if delivery is not None:
            stack.enter_context(delivery)
        report, result = _convert(Prepared(final, calibration, making), progress, delivery, log)
        ranks.on_first(lambda: write_own_card(final, log.emit))
        if not final.sends_away:
            result = ranks.on_first(lambda: move_result(final, claim, delivery))
        return ranks.first(lambda: push_own(final, report, delivery, result, log))


def _claim(plan: "ConversionPlan", stack: ExitStack, log: EventLog) -> "Claim":
    """Locks the output folder, of which there is one however many ranks write to it."""
    from hcsmoe_hub.machine import ranks
    from hcsmoe_hub.result.claim import Claim, claim_output, noting_what_is_kept

    claim = ranks.on_first(lambda: stack.enter_context(claim_output(plan))) or Claim(plan.output)
    stack.enter_context(noting_what_is_kept(claim, lambda: log.place))
    return claim


def _prepare(
    plan: "ConversionPlan", progress: "Progress", log: EventLog
) -> "tuple[CalibrationSet | None, dict[str, Any]]":
    """Reads the calibration set and describes it, or takes both from an interrupted conversion."""
    from dataclasses import asdict

    from hcsmoe_hub.calibration.calibration_set import CalibrationSet
    from hcsmoe_hub.pipeline.progress import TEXT
    from hcsmoe_hub.pipeline.refit_model import check_text
    from hcsmoe_hub.result.make_report import describe_making

    def prepare() -> dict[str, Any]:
        calibration = _calibrate(plan, log)
        making = describe_making(plan, calibration, log.emit)
        return {"calibration": None if calibration is None else asdict(calibration), "making": making}

    found = progress.once(TEXT, prepare)
    calibration = None if found["calibration"] is None else CalibrationSet(**found["calibration"])
    if plan.trains_model and calibration is not None:
        check_text(plan, calibration)
    return calibration, found["making"]


def _calibrate(plan: "ConversionPlan", log: EventLog) -> "CalibrationSet | None":
    """Reads the calibration set; ``None`` if statistics of an earlier version take its place."""
    from hcsmoe_hub.pipeline.run import load_tokens

    if plan.statistics is not None:
        return plan.statistics.text() if plan.statistics.has_text else None
    with log.timed(Stage.CALIBRATION, 1):
        return load_tokens(plan, log.emit)


def _open_delivery(
    plan: "ConversionPlan", making: Mapping[str, Any], kept: "KeptShards", *, token: str | None, listener: Listener
) -> "Delivery | None":
    """Finds or makes the repository that the result goes to; ``None`` if it is not pushed."""
    from hcsmoe_hub.publishing.result import open_delivery

    push = plan.options.push
    return None if push is None else open_delivery(plan, push, making, token=token, listener=listener, log=kept)


def _observe(
    plan: "ConversionPlan",
    calibration: "CalibrationSet | None",
    progress: "Progress",
    stack: ExitStack,
    log: EventLog,
) -> "ConversionPlan":
    """Makes a plan final whose budget or shape depends on statistics that nobody has collected yet."""
    from hcsmoe_hub.machine import ranks
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
        # Below the output folder, so that the next run finds them.
        folder = progress.folder or Path(stack.enter_context(TemporaryDirectory(prefix="hcsmoe-")))
        file = folder / f"statistics-{ranks.number()}"
    with log.timed(Stage.OBSERVE, len(plan.model.skeleton.layers)):
        return observe(plan, calibration, file, progress, log.emit)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A final plan, what the model runs on, and what is known about the result before the conversion."""

    plan: "ConversionPlan"
    calibration: "CalibrationSet | None"
    making: Mapping[str, Any]


def _convert(
    prepared: Prepared, progress: "Progress", delivery: "Delivery | None", log: EventLog
) -> "tuple[ConversionReport, Source | None]":
    """Converts with a final plan: from its statistics if it has some, otherwise on calibration tokens.

    Returns:
        The report, and on the first rank the checked result.
    """
    from hcsmoe_hub.machine import ranks
    from hcsmoe_hub.machine.device import peak_memory, resolve_device
    from hcsmoe_hub.pipeline.run import run
    from hcsmoe_hub.result.figure import draw
    from hcsmoe_hub.result.folder import open_writer, write_neurons, write_result
    from hcsmoe_hub.result.make_report import make_report
    from hcsmoe_hub.result.spectra_figure import draw_spectra
    from hcsmoe_hub.result.verify import check_structure

    plan, calibration, making = prepared.plan, prepared.calibration, prepared.making
    # What will change again is sent when it no longer does.
    recipient = None if plan.trains_model else delivery
    with open_writer(plan, recipient, keeps_digests=progress.is_kept) as writer:
        with log.timed(Stage.CONVERT, len(plan.model.skeleton.layers)):
            converted = run(plan, writer, calibration, progress, log.emit)
        trained = None
        if plan.trains_model and calibration is not None:
            trained, held_out = _train(plan, calibration, progress, delivery, log)
            converted = replace(converted, held_out=held_out)
        outcome = _measure(plan, calibration, converted, log)
        peak = peak_memory(resolve_device(plan.options.device))

        def finish() -> "tuple[ConversionReport, Source]":
            report = make_report(plan, making, outcome, warnings=log.warnings, seconds=log.seconds, peak=peak)
            report = replace(report, refit_model=trained, neurons=write_neurons(plan, converted.origins))
            if converted.pictures:
                draw(converted.pictures, plan.staging / FIGURE_FILE, title=plan.model.source.name)
            if converted.spectra:
                draw_spectra(converted.spectra, plan.staging / SINGULAR_VALUES_FILE, title=plan.model.source.name)
            write_result(plan, writer, report)
            if delivery is not None:
                delivery.wait_for_space()
            with log.timed(Stage.VERIFY, 1):
                sent = {} if delivery is None else delivery.sent
                return report, check_structure(plan.staging, sent=sent).source

        finished = ranks.on_first(finish)
        report = ranks.from_first(None if finished is None else finished[0])
        assert report is not None, "the first rank makes one"
        return report, None if finished is None else finished[1]


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
    plan: "ConversionPlan",
    calibration: "CalibrationSet",
    progress: "Progress",
    delivery: "Delivery | None",
    log: EventLog,
) -> "tuple[ModelRefitReport, HeldOut | None]":
    """Trains the whole reduced model, and sends its shards; it has no config yet."""
    from hcsmoe_hub.pipeline.refit_model import refit_model, training_steps

    with log.timed(Stage.REFIT, training_steps(calibration)):
        found = refit_model(plan, calibration, progress, log.emit)
    if delivery is not None:
        for shard in plan.shards.files:
            delivery.take(plan.staging / shard)
    return found
