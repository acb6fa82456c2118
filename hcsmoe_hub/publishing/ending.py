"""How a conversion ends: its card is written, its files are moved to their place, and its result is pushed."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from hcsmoe_hub.checkpoint.source import LocalSource, Source
from hcsmoe_hub.errors import OutputError, note_unpushed, unpushed
from hcsmoe_hub.events import EventLog, Listener, Stage, Warned
from hcsmoe_hub.model_cards import write_card
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.push_command import push_command
from hcsmoe_hub.publishing.delivery import Delivery
from hcsmoe_hub.publishing.result import open_delivery, push_result
from hcsmoe_hub.report import REPORT_FILE, ConversionReport
from hcsmoe_hub.report.read import read_report
from hcsmoe_hub.result.claim import Claim
from hcsmoe_hub.result.verify import check_structure


def write_own_card(plan: ConversionPlan, emit: Listener) -> None:
    """Writes the model card, unless a person's own would be lost: that one is not part of the result.

    Args:
        plan: The conversion, whose other files are in the staging folder.
        emit: Called with warnings.
    """
    push = plan.options.push
    try:
        card = write_card(plan.staging, None if push is None else push.repo_id, place=plan.output)
        # They matter only to those who publish.
        for message in card.warnings if push is not None else ():
            emit(Warned(message))
    except OutputError as error:
        emit(Warned(f"{error.message} It stays as it is; 'hcsmoe card {plan.output} --overwrite' replaces it."))


def move_result(plan: ConversionPlan, claim: Claim, delivery: Delivery | None) -> Source:
    """Moves a complete result to its place, while nothing of it is being sent, and opens it there."""
    with nullcontext() if delivery is None else delivery.moving(plan.output):
        claim.commit()
    return LocalSource(plan.output)


@contextmanager
def _noting_unpushed(plan: ConversionPlan) -> Iterator[None]:
    """Lets what interrupts a push say which command pushes the result, if that is in its place."""
    try:
        yield
    except KeyboardInterrupt as error:
        if plan.options.push is not None and not plan.sends_away and unpushed(error) is None:
            note_unpushed(error, push_command(plan.output, plan.options.push))
        raise


def push_own(
    plan: ConversionPlan, report: ConversionReport, delivery: Delivery | None, result: Source | None, log: EventLog
) -> ConversionReport:
    """Makes a result visible on the Hub, if it is pushed.

    Args:
        plan: The conversion.
        report: Its report.
        delivery: What has sent the shards; ``None`` if the result is not pushed.
        result: The checked result.
        log: Called with the progress.

    Returns:
        The report, with where the result was pushed to.

    Raises:
        PushError: If it cannot be pushed.
    """
    if delivery is None:
        return report
    assert plan.options.push is not None, "there is a delivery for a push only"
    assert result is not None, "the rank that has a delivery has checked the result"
    with _noting_unpushed(plan), log.timed(Stage.PUSH, 1):
        return replace(report, pushed=push_result(plan, plan.options.push, delivery, result))


def finish_earlier(plan: ConversionPlan, token: str | None, log: EventLog) -> ConversionReport:
    """Checks a result that an earlier run has completed and that is in its place now, and pushes it if it is pushed.

    Args:
        plan: The conversion.
        token: Access token; ``None`` uses the stored login.
        log: Called with the progress.

    Raises:
        VerificationError: If it was changed in the meantime.
        PushError: If it cannot be pushed.
    """
    result = check_structure(plan.output).source
    report = read_report(result.text(REPORT_FILE), label=str(plan.output / REPORT_FILE))
    if plan.options.push is None:
        return report
    content = report.as_dict()
    making = {name: content.get(name) for name in ("tool", "source", "experts", "method", "calibration", "like")}
    with (
        _noting_unpushed(plan),
        open_delivery(plan, plan.options.push, making, token=token, listener=log.emit) as delivery,
    ):
        with delivery.moving(plan.output):
            # This run has moved the files before it could send any.
            pass
        return push_own(plan, report, delivery, result, log)
