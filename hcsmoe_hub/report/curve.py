"""What a curve of size against quality found: the document of ``hcsmoe curve --json``."""

from dataclasses import asdict, dataclass
from typing import Any

from hcsmoe_hub.report.schema import MethodRecord, Tool
from hcsmoe_hub.report.texts import CalibrationRecord, Measured


@dataclass(frozen=True, slots=True, kw_only=True)
class PointLayer:
    """One MoE layer at one size.

    Attributes:
        layer: Index of the decoder layer.
        predicted_loss: Share of the routed experts' output energy that it is predicted to lose, from the energies of
            neurons on calibration text, 0 to 1.
        output_error: ``||new - old|| / ||old||`` of the routed outputs on held-out tokens, which reach the layer as in
            the source: what this layer alone changes.
        measured_tokens: Number of these tokens; 0 where the layer is the source's.
    """

    layer: int
    predicted_loss: float
    output_error: float
    measured_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One size.

    Attributes:
        experts: Experts per MoE layer.
        expert_width: Neurons of every expert.
        parameters: All parameters.
        active_parameters: Parameters that one token uses.
        weights_bytes: Bytes of all stored tensors.
        kept_share: Parameters of the routed experts over those of the source's, 0 to 1.
        predicted_ratio: Perplexity over that of the source as it is predicted from the other points that were measured;
            ``None`` where they are too few, or lie too close together to predict this one.
        measured: What was measured, as in ``hcsmoe.json``; ``None`` if it was not, or is not finite.
        layers: The MoE layers.
    """

    experts: int
    expert_width: int
    parameters: int
    active_parameters: int
    weights_bytes: int
    kept_share: float
    predicted_ratio: float | None
    measured: Measured | None
    layers: list[PointLayer]

    @property
    def ratio(self) -> float | None:
        """The measured ratio of perplexities; where there is none, the predicted one."""
        return self.predicted_ratio if self.measured is None else self.measured["overall"]["ratio"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionRecord:
    """How ratios were predicted, and how well that did.

    Attributes:
        formula: The formula.
        scale: Its first number, fitted to all measured points.
        power: Its second number.
        points: Number of the points that they were fitted to.
        mean_error: Mean over these points of ``|predicted - measured| / (measured - 1)``, each point predicted from the
            others; ``None`` where they are too few.
        worst_error: The largest of these errors.
    """

    formula: str
    scale: float
    power: float
    points: int
    mean_error: float | None
    worst_error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveReport:
    """Size against quality of one source.

    Attributes:
        tool: Name and version of this program.
        source: The checkpoint.
        method: Every choice that the points were made by.
        calibration: What the experts were observed on.
        experts: Experts per MoE layer of the source.
        expert_width: Neurons of every expert of the source.
        parameters: Parameters of the source.
        active_parameters: Parameters of the source that one token uses.
        weights_bytes: Bytes of all stored tensors of the source.
        points: The points, in the order in which they were asked for.
        prediction: How ratios were predicted; ``None`` where too few points were measured.
        warnings: What a person should know.
        timings_seconds: Seconds by stage.
    """

    tool: Tool
    source: dict[str, Any]
    method: MethodRecord
    calibration: CalibrationRecord
    experts: int
    expert_width: int
    parameters: int
    active_parameters: int
    weights_bytes: int
    points: list[CurvePoint]
    prediction: PredictionRecord | None
    warnings: list[str]
    timings_seconds: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)
