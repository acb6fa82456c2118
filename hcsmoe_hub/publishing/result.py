"""Pushes a result while it is converted: opens the repository before, commits after."""

from collections.abc import Mapping
from typing import Any

from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.events import Listener
from hcsmoe_hub.hub.write_errors import PushError
from hcsmoe_hub.options import PushOptions
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.push_command import push_command
from hcsmoe_hub.publishing.delivery import Delivery
from hcsmoe_hub.publishing.files import checkpoint_files
from hcsmoe_hub.publishing.publisher import Publisher
from hcsmoe_hub.publishing.sent import SentLog
from hcsmoe_hub.report import Pushed


def open_delivery(
    plan: ConversionPlan,
    options: PushOptions,
    making: Mapping[str, Any],
    *,
    token: str | None,
    listener: Listener,
    log: SentLog | None = None,
) -> Delivery:
    """Finds or creates the repository of a result.

    Args:
        plan: The conversion.
        options: Target repository and branch.
        making: Provenance that the report will record.
        token: Access token; ``None`` uses the stored login.
        listener: Called with the progress of the upload, from several threads.
        log: Keeps what a later run needs of shards that are deleted, and has what an earlier one has kept.

    Raises:
        PushError: If the repository must not be written to, or no longer has what an earlier run has sent.
    """
    publisher = Publisher(plan.staging, options, token=token, listener=listener)
    publisher.open(recipe=making)
    # A result of one shard needs the disk space for all of it anyway.
    deletes = plan.sends_away and len(plan.shards.files) > 1
    delivery = Delivery(publisher, deletes=deletes, listener=listener, log=log)
    if log is not None:
        delivery.restore(log.sent(), plan.staging)
    return delivery


def push_result(plan: ConversionPlan, options: PushOptions, delivery: Delivery, result: Source) -> Pushed:
    """Commits what was uploaded.

    Args:
        plan: The conversion.
        options: Target repository and branch.
        delivery: The delivery that has uploaded the shards.
        result: The checked result.

    Raises:
        PushError: If the commit fails.
    """
    command = push_command(plan.output, options)
    try:
        return delivery.commit(checkpoint_files(result))
    except PushError as error:
        if plan.sends_away:
            raise
        raise PushError(
            f"{error.message} The result itself is complete: {plan.output}.",
            hint=f"push it with '{command}'; first: {error.hint}",
        ) from error
