"""Puts together what a conversion reports: what it was made of and how, and what came out."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.checkpoint.tensors import total_bytes
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.events import Listener, Warned
from hcsmoe_hub.inherited import inherit_from
from hcsmoe_hub.plan import ConversionPlan
from hcsmoe_hub.report import ConversionReport, LayerReport, describe_source, without_places
from hcsmoe_hub.statistics_file import calibration_record, dataset_name
from hcsmoe_hub.versions import installed_versions, tool


def describe_making(plan: ConversionPlan, token_ids: Tensor | None, emit: Listener) -> dict[str, Any]:
    """The part of a report that is known before the conversion, and that two conversions with the same result share.

    Args:
        plan: The conversion.
        token_ids: ``[B, S]`` int64; ``None`` where the plan has statistics.
        emit: Told of a card of the source that cannot be read.
    """
    source, before, after = plan.model.source, plan.model.settings, plan.settings
    described = {**describe_source(source), "model_type": source.config["model_type"]}
    return {
        "tool": tool(),
        "source": {**described, **_inherited(source, emit)},
        "experts": {
            "before": before.experts,
            "after": plan.options.experts,
            "per_token_before": before.experts_per_token,
            "per_token_after": after.experts_per_token,
            "moe_layers": len(plan.model.blocks),
        },
        "method": plan.recipe.as_dict(),
        "calibration": calibration_record(plan, token_ids),
    }


def _inherited(source: Source, emit: Listener) -> dict[str, Any]:
    """What the card of a source says of licence and use; a card that cannot be read is no reason to lose a result."""
    try:
        return inherit_from(source)
    except SourceError as error:
        emit(Warned(f"{error.message} The licence of the source is not recorded."))
        return {"gated": bool(source.gated)}


def make_report(
    plan: ConversionPlan,
    making: Mapping[str, Any],
    layers: list[LayerReport],
    *,
    warnings: list[str],
    seconds: dict[str, float],
    peak: dict[str, int],
) -> ConversionReport:
    """The report of a conversion.

    Args:
        plan: The conversion.
        making: What was known before, from ``describe_making``.
        layers: One report per MoE layer.
        warnings: What was told meanwhile; places on this machine are left out.
        seconds: Time of each stage.
        peak: Peak memory in bytes, by device.
    """
    source, before, after = plan.model.source, plan.model.settings, plan.settings
    dataset = plan.options.calibration.dataset
    names = {str(source.path): source.name, dataset: dataset_name(dataset)}
    total = {"before": plan.model.parameters, "after": plan.parameters_after}
    idle = {
        "before": _idle_parameters(plan, plan.model.skeleton.state, before.experts_per_token),
        "after": _idle_parameters(plan, plan.state, after.experts_per_token),
    }
    return ConversionReport(
        **making,
        parameters=total,
        active_parameters={when: total[when] - idle[when] for when in total},
        weights_bytes={
            "before": total_bytes(source.tensors.values()),
            "after": total_bytes(plan.layout.tensors.values()),
        },
        layers=layers,
        dropped_tensors=plan.account.dropped,
        warnings=[without_places(message, names) for message in warnings],
        timings_seconds=seconds,
        peak_memory_bytes=peak,
        versions=installed_versions(),
    )


def _idle_parameters(plan: ConversionPlan, state: Mapping[str, Tensor], per_token: int) -> int:
    """Parameters of the routed experts that a token does not visit, in all layers."""
    idle = 0
    for expert in (expert for block in plan.model.blocks for expert in block.experts):
        tensor = state[expert.name]
        rows = tensor.shape[expert.dim] - expert.extra_rows - per_token * expert.rows_per_expert
        idle += max(rows, 0) * (tensor.numel() // tensor.shape[expert.dim])
    return idle
