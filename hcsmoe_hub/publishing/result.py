"""A result that is pushed while it is made: the repository before, the commit after."""

import shlex
from collections.abc import Mapping
from typing import Any

from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.events import Listener
from hcsmoe_hub.hub.write_errors import PushError
from hcsmoe_hub.options import PushOptions
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.publishing.delivery import Delivery
from hcsmoe_hub.publishing.files import checkpoint_files
from hcsmoe_hub.publishing.publisher import Publisher
from hcsmoe_hub.report import Pushed


def open_delivery(
    plan: ConversionPlan, options: PushOptions, making: Mapping[str, Any], *, token: str | None, listener: Listener
) -> Delivery:
    """Finds or makes the repository that a result goes to.

    Args:
        plan: The conversion.
        options: Where its result goes.
        making: What the report will say of how it was made.
        token: Access token; ``None`` uses the stored login.
        listener: Called with what is sent, from several threads.

    Raises:
        PushError: If the repository must not be written to.
    """
    publisher = Publisher(plan.output, options, token=token, listener=listener)
    publisher.open(recipe=making)
    # A result of one shard is on the disk as a whole in any case.
    return Delivery(publisher, deletes=plan.sends_away and len(plan.shards.files) > 1, listener=listener)


def push_result(plan: ConversionPlan, options: PushOptions, delivery: Delivery, result: Source) -> Pushed:
    """Commits what was sent.

    Args:
        plan: The conversion.
        options: Where its result goes.
        delivery: Has sent the shards.
        result: The checked result.

    Raises:
        PushError: If that fails.
    """
    try:
        return delivery.commit(checkpoint_files(result))
    except PushError as error:
        if plan.sends_away:
            raise
        folder = shlex.quote(str(plan.output))
        raise PushError(
            f"{error.message} The result itself is complete: {plan.output}.",
            hint=f"push it with 'hcsmoe push {folder} {options.repo_id}'; first: {error.hint}",
        ) from error
