"""The whole story: plan, stream (observe, cluster, merge, route), write, verify.

Importing this module is cheap; torch and transformers are imported when a conversion begins.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hcsmoe_hub.errors import OutputError
from hcsmoe_hub.events import Event, Listener, Stage, StageFinished, StageStarted, Warned, ignore
from hcsmoe_hub.options import ConvertOptions
from hcsmoe_hub.report import FIGURE_FILE, ConversionReport

if TYPE_CHECKING:
    from torch import Tensor

    from hcsmoe_hub.checkpoint.source import Source
    from hcsmoe_hub.planning.conversion_plan import ConversionPlan
    from hcsmoe_hub.publishing.delivery import Delivery


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
    from hcsmoe_hub.checkpoint.source import Source
    from hcsmoe_hub.hub.open import open_source
    from hcsmoe_hub.machine.device import resolve_device
    from hcsmoe_hub.planning.make import make_plan

    device = resolve_device(options.device)
    if options.push is not None:
        from hcsmoe_hub.hub.repository import check_repo_id

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
    from hcsmoe_hub.pipeline.run import load_tokens, observe
    from hcsmoe_hub.publishing.result import open_delivery, push_result
    from hcsmoe_hub.result.folder import claim_output
    from hcsmoe_hub.result.make_report import describe_making

    log, push, token_ids, delivery = _Log(listener, plan.warnings), plan.options.push, None, None
    with TemporaryDirectory(prefix="hcsmoe-") as scratch:
        if plan.statistics is None:
            with log.timed(Stage.CALIBRATION, 1):
                token_ids = load_tokens(plan, log.emit)
        making = describe_making(plan, token_ids, log.emit)
        if push is not None:
            delivery = open_delivery(plan, push, making, token=token, listener=listener)
        if not plan.is_final:
            assert token_ids is not None, "statistics make every plan final"
            with log.timed(Stage.OBSERVE, len(plan.model.skeleton.layers)):
                plan = observe(plan, token_ids, plan.options.statistics or Path(scratch) / "statistics", log.emit)
        with claim_output(plan) as claim, delivery or nullcontext():
            report, result = _convert(plan, token_ids, making, delivery, log)
            claim.stays = not plan.sends_away
            claim.card = _write_card(plan, log.emit)
            if push is None or delivery is None:
                return report
            with log.timed(Stage.PUSH, 1):
                return replace(report, pushed=push_result(plan, push, delivery, result))


class _Log:
    """Passes events on, and keeps what the report tells of them."""

    def __init__(self, listener: Listener, warnings: Sequence[str]) -> None:
        self._listener = listener
        self.warnings: list[str] = []
        self.seconds: dict[str, float] = {}
        for message in warnings:
            self.emit(Warned(message))

    def emit(self, event: Event) -> None:
        if isinstance(event, Warned):
            self.warnings.append(event.message)
        self._listener(event)

    @contextmanager
    def timed(self, stage: Stage, total: int) -> Iterator[None]:
        self.emit(StageStarted(stage, total))
        start = time.perf_counter()
        yield
        self.seconds[stage.value] = round(time.perf_counter() - start, 3)
        self.emit(StageFinished(stage, self.seconds[stage.value]))


def _convert(
    plan: "ConversionPlan",
    token_ids: "Tensor | None",
    making: Mapping[str, Any],
    delivery: "Delivery | None",
    log: _Log,
) -> "tuple[ConversionReport, Source]":
    """Converts with a final plan: from its statistics if it has some, otherwise on calibration tokens."""
    from hcsmoe_hub.pipeline.run import run
    from hcsmoe_hub.result.figure import draw
    from hcsmoe_hub.result.folder import open_writer, write_result
    from hcsmoe_hub.result.make_report import make_report
    from hcsmoe_hub.result.verify import check_structure

    with open_writer(plan, delivery) as writer:
        with log.timed(Stage.CONVERT, len(plan.model.skeleton.layers)):
            layers, pictures, peak = run(plan, writer, token_ids, log.emit)
        report = make_report(plan, making, layers, warnings=log.warnings, seconds=log.seconds, peak=peak)
        if pictures:
            draw(pictures, plan.output / FIGURE_FILE, title=plan.model.source.name)
        write_result(plan, writer, report)
        if delivery is not None:
            delivery.wait_for_space()
        with log.timed(Stage.VERIFY, 1):
            result = check_structure(plan.output, sent={} if delivery is None else delivery.sent).source
    return report, result


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
