"""Refits the down projections to experts that are rounded to the format of the source."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.layer.refit_down import ExpertFit, down_projections
from hcsmoe_hub.layer.stored_experts import Heritage, Rounded, StoredExperts
from hcsmoe_hub.machine.precision import fast_products
from hcsmoe_hub.methods.refit.rounded_down import fit_rounded_down
from hcsmoe_hub.observation.watcher import Observation

# Most pieces in which the rows of a down projection are rounded; each costs a fit of those that are left.
PIECES = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rounder:
    """Rounds the experts of one layer.

    Attributes:
        stored: What rounds them.
        heritage: Where they come from.
        before: All of them, rounded.
    """

    stored: StoredExperts
    heritage: Heritage
    before: Rounded


def refit_rounded(
    layer: LayerContext, changed: Mapping[str, Tensor], rounder: Rounder, *, seen: Observation
) -> Rounded:
    """Lets down projections make up for the rounding of all matrices, if that helps every domain of held-out text.

    Args:
        layer: The layer.
        changed: Tensors of its block in the result before they were rounded, by parameter name.
        rounder: Rounds them.
        seen: Inputs of the block, and the routed outputs it is fitted to.

    Returns:
        The experts, rounded, with these down projections or as they were; the latter where an expert's output is not a
        sum over its neurons times the router weight, which least squares need.
    """
    before, experts = rounder.before, layer.source.experts
    if experts.scales_input or not experts.is_affine:
        return before
    block = layer.reduced({**changed, **before.tensors})
    with block as reduced, torch.no_grad(), fast_products(layer.device):
        fit = ExpertFit.of(layer, reduced, seen)
        name = _owner(fit)
        if name not in before.tensors:
            return before
        unfitted, neurons = fit.verdict(), fit.down_CIH.shape[1]
        piece = _piece(rounder.stored.piece(name), neurons)
        found = before

        def round_down(down_CIH: Tensor) -> Tensor:
            nonlocal found
            found = rounder.stored.round(layer, {name: fit.parameters[name].to(changed[name].dtype)}, rounder.heritage)
            return down_projections(reduced, {**fit.parameters, **found.tensors})

        fit.parameters[name].copy_(changed[name])
        sample, wanted_TH = fit.fitted
        fit_rounded_down(sample, wanted_TH, fit.down_CIH, round_down=round_down, piece=piece, kept_bytes=fit.kept_bytes)
        if not fit.verdict().worst(unfitted) < 1:
            return before
    return Rounded(tensors={**before.tensors, **found.tensors}, parts={**before.parts, **found.parts})


def _owner(fit: ExpertFit) -> str:
    """The parameter that the down projections are a view of."""
    place = fit.down_CIH.untyped_storage().data_ptr()
    return next(name for name, held in fit.parameters.items() if held.untyped_storage().data_ptr() == place)


def _piece(unit: int | None, neurons: int) -> int:
    """Neurons that are rounded at once."""
    if unit is None:
        return neurons
    return -(-neurons // (PIECES * unit)) * unit
