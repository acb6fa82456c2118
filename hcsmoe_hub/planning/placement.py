"""Where a conversion keeps what: on the accelerator as far as it fits there, on the host otherwise."""

from collections.abc import Iterator
from dataclasses import replace

from hcsmoe_hub.machine.device import default_batch_tokens
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.memory_use import memory_use

# Tokens per micro-batch that keep an accelerator busy, and those below which too little memory is saved to matter.
_BUSY_TOKENS, _LEAST_TOKENS = 8192, 1024


def placed(plan: ConversionPlan) -> ConversionPlan:
    """The same plan with everything where it fits; where nothing fits, with as little on the accelerator as possible.

    Micro-batches become smaller where that helps, unless the options say how large they are.
    """
    tokens = plan.options.batch_tokens or default_batch_tokens(on_device=plan.on_device)
    found = replace(plan, keeps_states_on_device=False, experts_on_host=False, batch_tokens=tokens)
    if plan.device_room is None:
        return found
    for candidate in _candidates(found):
        found = candidate
        if memory_use(found).device <= plan.device_room:
            break
    return found


def _candidates(plan: ConversionPlan) -> Iterator[ConversionPlan]:
    """The fastest first, the one that takes the least memory of the accelerator last."""
    with_states = replace(plan, keeps_states_on_device=True)
    yield from _smaller_batches(with_states, _BUSY_TOKENS)
    yield from _smaller_batches(plan, _LEAST_TOKENS)
    yield from _smaller_batches(replace(plan, experts_on_host=True), _LEAST_TOKENS)


def _smaller_batches(plan: ConversionPlan, least: int) -> Iterator[ConversionPlan]:
    yield plan
    tokens = plan.batch_tokens if plan.options.batch_tokens is None else 0
    while tokens // 2 >= max(least, plan.calibration.sequence_length):
        tokens //= 2
        yield replace(plan, batch_tokens=tokens)
