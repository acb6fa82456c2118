"""What a curve of size against quality may be asked for."""

from dataclasses import dataclass, field
from pathlib import Path

from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.options.checks import Count, DeviceName, Width, check_fields
from hcsmoe_hub.options.choices import Device
from hcsmoe_hub.options.conversion import CalibrationOptions
from hcsmoe_hub.options.memory_limits import MaxMemory

# Points that a prediction is fitted to at the least.
FEWEST_MEASURED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveOptions:
    """Which sizes are compared, on which text, and where.

    The points are all combinations of ``experts`` and ``expert_width``. With neither, they are all, three quarters and
    half of the experts at all, three quarters and half of the neurons, as far as the model allows.

    Attributes:
        experts: Experts to keep in every MoE layer; empty for all of them.
        expert_width: Neurons to keep in every expert, or shares of them such as ``"75%"``; empty for all of them.
        measure_points: Number of points to run on held-out text for their perplexity, at even distances in size; that
            of the others is predicted from them. ``None`` runs all of them.
        calibration: Which text the experts are observed on.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        batch_tokens: Tokens per micro-batch while a layer runs, ``None`` for what suits the device; halved when memory
            runs out.
        max_memory: Memory that the curve may need: bytes or a size such as ``"24GB"`` for the host, or by place,
            ``{"cpu": "24GB", "cuda:0": "40GB"}``; ``"cuda"`` is every accelerator, a number a certain one. Under a
            limit, a curve is refused if its estimated peak is above it, and begins otherwise, even if less is
            free. Without one, it is refused if its peak is above what is free.
        statistics: File of calibration statistics to write, for conversions to any of the points.
        keep_states: Whether that file holds the hidden states of all calibration tokens, as for a conversion.
        figure: Picture to draw.

    Raises:
        PlanError: If a value is not one that the option takes.
    """

    experts: tuple[Count, ...] = ()
    expert_width: tuple[Width, ...] = ()
    measure_points: Count | None = None
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    device: DeviceName = Device.AUTO
    batch_tokens: Count | None = None
    max_memory: MaxMemory | None = None
    statistics: Path | None = None
    keep_states: bool = True
    figure: Path | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.measure_points is not None and self.measure_points < FEWEST_MEASURED:
            raise PlanError(
                f"`measure_points={self.measure_points}` is too small: a prediction is fitted to {FEWEST_MEASURED} "
                "measured points or more.",
                hint=f"use `measure_points={FEWEST_MEASURED}` or more, or leave it out",
            )
