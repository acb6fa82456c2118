"""What becomes of multi-token prediction heads that a model does not load."""

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.model.mtp import has_experts
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.options import ConvertOptions, Layout, Mtp
from hcsmoe_hub.planning.tensor_fates import MtpRule
from hcsmoe_hub.recipe.recipe import Recipe


def mtp_rule(model: SourceModel, recipe: Recipe, options: ConvertOptions, *, keeps_all: bool) -> MtpRule:
    """What becomes of the MTP heads that the model does not load.

    Args:
        model: The source.
        recipe: How it is converted.
        options: All other options.
        keeps_all: Whether every layer keeps all experts with all of their neurons.

    Raises:
        PlanError: If there is none to drop.
    """
    if options.mtp is Mtp.DROP:
        if not model.mtp_keys:
            raise PlanError(
                f"`mtp='drop'` has nothing to drop: {model.source.label} stores no MTP head.", hint="leave `mtp` out"
            )
        return MtpRule(dropped="MTP head, dropped as `mtp='drop'` asks")
    if recipe.layout is Layout.FACTORED and not keeps_all and has_experts(model.mtp_keys):
        return MtpRule(dropped="MTP head with experts of its own, which the factored layout does not hold")
    # The config of a mapped result still has the N router rows that a head in its original form has.
    return MtpRule(fits=recipe.layout is Layout.MAPPED or keeps_all)
