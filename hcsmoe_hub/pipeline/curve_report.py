"""Puts together what a curve found: sizes, figures of layers, perplexity, and how well it was predicted."""

from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean
from typing import Any, cast

from hcsmoe_hub.calibration.calibration_set import CalibrationSet
from hcsmoe_hub.calibration.sources import dataset_name
from hcsmoe_hub.machine.versions import tool
from hcsmoe_hub.methods.quality.prediction import RatioLaw, excess_error, leave_one_out
from hcsmoe_hub.model.width import neurons_of
from hcsmoe_hub.pipeline.curve import PointWork
from hcsmoe_hub.planning.curve_plan import CurvePlan, is_source
from hcsmoe_hub.planning.sizes import active_parameter_counts, parameter_counts, weight_bytes
from hcsmoe_hub.report import Measured, strip_paths
from hcsmoe_hub.report.curve import CurvePoint, CurveReport, PointLayer, PredictionRecord
from hcsmoe_hub.result.make_report import calibration_record, describe_source

FORMULA = "log(ratio) = scale * (mean output_error of the layers) ** power"


def make_curve_report(
    plan: CurvePlan,
    calibration: CalibrationSet,
    points: list[PointWork],
    measured: Mapping[int, Measured | None],
    *,
    warnings: list[str],
    seconds: dict[str, float],
) -> CurveReport:
    """The report of a curve.

    Args:
        plan: What was compared.
        calibration: What the model was run on.
        points: The points after the pass.
        measured: Figures of those that were measured, by number; ``None`` where they are not finite.
        warnings: Warnings of the run; paths on this machine are shortened to names.
        seconds: Time of each stage.
    """
    first, dataset = plan.points[0], plan.options.calibration.dataset
    source = plan.model.source
    names = {str(source.path): source.name, dataset: dataset_name(dataset)}
    described = [_point(point, measured.get(number)) for number, point in enumerate(points)]
    record = _predict(described)
    return CurveReport(
        tool=cast(Any, tool()),
        source={**describe_source(source), "model_type": source.config["model_type"]},
        method=cast(Any, first.method),
        calibration=calibration_record(first, calibration),
        experts=plan.model.settings.experts,
        expert_width=neurons_of(plan.model),
        parameters=parameter_counts(first)["before"],
        active_parameters=active_parameter_counts(first)["before"],
        weights_bytes=weight_bytes(first)["before"],
        points=described,
        prediction=record,
        warnings=[strip_paths(message, names) for message in warnings],
        timings_seconds=seconds,
    )


def _point(point: PointWork, measured: Measured | None) -> CurvePoint:
    """One point, its ratio not predicted yet."""
    plan = point.plan
    layers = []
    for layer, lost in point.lost.items():
        deviation = point.deviations.get(layer)
        layers.append(
            PointLayer(
                layer=layer,
                predicted_loss=lost,
                output_error=0.0 if deviation is None else deviation.output_error,
                measured_tokens=0 if deviation is None else deviation.tokens,
            )
        )
    return CurvePoint(
        experts=plan.experts,
        expert_width=plan.width,
        parameters=parameter_counts(plan)["after"],
        active_parameters=active_parameter_counts(plan)["after"],
        weights_bytes=weight_bytes(plan)["after"],
        kept_share=plan.kept_share,
        predicted_ratio=1.0 if is_source(plan) else None,
        measured=measured,
        layers=layers,
    )


def _predict(points: list[CurvePoint]) -> PredictionRecord | None:
    """Predicts the ratio of every point but the source, in place, each from the others that were measured."""
    others = [number for number, point in enumerate(points) if point.predicted_ratio is None]
    known = [number for number in others if points[number].measured is not None]
    error = {number: fmean(layer.output_error for layer in points[number].layers) for number in others}
    ratio = {number: _measured_ratio(points[number]) for number in known}
    law = RatioLaw.fit([error[number] for number in known], list(ratio.values()))
    if law is None:
        return None
    alone = dict(zip(known, leave_one_out([error[number] for number in known], list(ratio.values())), strict=True))
    for number in others:
        predicted = alone[number] if number in alone else law.ratio(error[number])
        points[number] = replace(points[number], predicted_ratio=predicted)
    off = [
        excess_error(predicted, ratio[number])
        for number, predicted in alone.items()
        if predicted is not None and ratio[number] != 1
    ]
    return PredictionRecord(
        formula=FORMULA,
        scale=law.scale,
        power=law.power,
        points=len(known),
        mean_error=fmean(off) if off else None,
        worst_error=max(off, default=None),
    )


def _measured_ratio(point: CurvePoint) -> float:
    assert point.measured is not None, "only measured points are asked for"
    return point.measured["overall"]["ratio"]
