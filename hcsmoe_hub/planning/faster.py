"""What a plan says if it takes long: how long, and what would be faster."""

from collections.abc import Iterator

from hcsmoe_hub.machine.known_rates import H100
from hcsmoe_hub.machine.rates import Rates
from hcsmoe_hub.machine.units import format_seconds
from hcsmoe_hub.options import Preset
from hcsmoe_hub.planning.alternatives import with_method
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.duration import plan_duration
from hcsmoe_hub.planning.estimate import estimate_needs

# What takes longer is worth a word about something faster.
LONG_SECONDS = 3600.0
# Rates that every machine reaches: what is done within an hour at such a rate need not be timed. FLOP/s.
_LEAST_ON_HOST, _LEAST_ON_DEVICE = 1e10, 1e12
# The better preset first.
_FASTER = (Preset.HC_SMOE, Preset.REAP)
# What a preset decides if nothing else is asked for.
_OF_THE_PRESET = dict.fromkeys(("refit", "refit_passes", "propagate", "router"))


def may_take_long(plan: ConversionPlan) -> bool:
    """Whether a conversion could take more than an hour on the slowest of machines; measures nothing."""
    least = _LEAST_ON_DEVICE if plan.on_device else _LEAST_ON_HOST
    return estimate_needs(plan).flops / least > LONG_SECONDS


def long_warning(plan: ConversionPlan, rates: Rates) -> str | None:
    """How long a conversion takes and which preset is faster; ``None`` if it takes at most an hour.

    The preset is the best one that takes less than an hour. If none does, the message names the fastest, and what an
    accelerator would make of the plan.

    Args:
        plan: The conversion.
        rates: How fast this machine is.
    """
    seconds = plan_duration(plan, rates).seconds
    if seconds <= LONG_SECONDS:
        return None
    took = f"the conversion takes about {format_seconds(seconds)} on this machine"
    times = {preset: plan_duration(faster, rates).seconds for preset, faster in _faster_plans(plan)}
    times = {preset: time for preset, time in times.items() if time < 0.8 * seconds}
    for preset, time in times.items():
        if time <= LONG_SECONDS:
            return f"{took}. `preset='{preset}'` takes about {format_seconds(time)}."
    if times:
        preset = min(times, key=times.__getitem__)
        took += f", and `preset='{preset}'` still about {format_seconds(times[preset])}"
    return f"{took}. {_faster_machine(plan)}"


def _faster_plans(plan: ConversionPlan) -> Iterator[tuple[Preset, ConversionPlan]]:
    """The same conversion by the presets that are faster than the default, as far as they suit the model."""
    for preset in _FASTER:
        faster = with_method(plan, {"preset": preset, **_OF_THE_PRESET})
        if faster is not None:
            yield preset, faster


def _faster_machine(plan: ConversionPlan) -> str:
    """What would shorten a conversion that no preset makes short."""
    if plan.on_device:
        return "Several accelerators would share the work."
    seconds = plan_duration(plan, H100, on_device=True).seconds
    return f"A GPU would shorten it: by its data sheet, one H100 could do it in about {format_seconds(seconds)}."
