"""The same conversion by another method, for advice on what is cheaper or faster."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.options import default_samples
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.refusals import check_recipe, suit_default


def with_method(plan: ConversionPlan, changes: Mapping[str, Any]) -> ConversionPlan | None:
    """A plan with other options of the method, on as much text as these use by default.

    Args:
        plan: The conversion.
        changes: Fields of ``MethodOptions``.

    Returns:
        The other plan; ``None`` if its options are refused, change nothing, or lead to another layout.
    """
    options = replace(plan.options, method=replace(plan.options.method, **changes))
    try:
        recipe, _ = suit_default(plan.model, options)
        check_recipe(plan.model, recipe, options, experts=plan.experts)
    except PlanError:
        return None
    if recipe == plan.recipe or recipe.layout is not plan.recipe.layout:
        return None
    calibration = plan.calibration
    if options.calibration.samples is None and reads_text(plan):
        samples = default_samples(calibration.sequence_length, fits=recipe.refits)
        calibration = replace(calibration, sequences=samples)
    return replace(plan, options=options, recipe=recipe, calibration=calibration)


def reads_text(plan: ConversionPlan) -> bool:
    """Whether the number of samples is a choice: token ids and statistics have theirs."""
    return plan.statistics is None and not plan.calibration.is_token_ids
