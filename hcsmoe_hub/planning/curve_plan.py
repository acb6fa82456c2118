"""The points of a curve of size against quality: a plan for each, all of one source."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from hcsmoe_hub.calibration.measured import MEASURED_TOKENS
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.machine.memory import available_memory
from hcsmoe_hub.machine.units import format_bytes
from hcsmoe_hub.machine.versions import has_matplotlib
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.model.width import neurons_of
from hcsmoe_hub.options import (
    ConvertOptions,
    CurveOptions,
    Device,
    MethodOptions,
    Propagate,
    Refit,
    default_samples,
)
from hcsmoe_hub.options.memory_limits import limit_of
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.estimate import estimate_needs
from hcsmoe_hub.planning.expert_shape import expert_shape
from hcsmoe_hub.planning.layer_sizes import Memory
from hcsmoe_hub.planning.make import open_model, plan_model
from hcsmoe_hub.planning.memory import device_name, fallback_warning, limits_device
from hcsmoe_hub.planning.refusals import suit_default
from hcsmoe_hub.planning.sizes import weight_bytes

ALL = "100%"
DEFAULT_WIDTHS = (ALL, "75%", "50%")
# Copies of the hidden states of every point: what goes into a layer, what comes out, and both put together.
_STATES = 3


@dataclass(slots=True, kw_only=True)
class CurvePlan:
    """What a curve compares.

    Attributes:
        options: What was asked for.
        points: A plan for every point, all of the same model; nothing is written by any of them.
        measured: Numbers of the points that are measured.
        warnings: Where the user's wish was bent, or a second look is due.
    """

    options: CurveOptions
    points: list[ConversionPlan]
    measured: frozenset[int]
    warnings: list[str]

    @property
    def model(self) -> SourceModel:
        """The source."""
        return self.points[0].model

    @property
    def memory(self) -> Memory:
        """Estimated peak of resident memory, and of the accelerator's."""
        found = Memory()
        for point in self.points:
            needs = estimate_needs(point)
            found |= Memory(needs.memory_bytes, needs.device_bytes)
        token = self.model.skeleton.text_config.hidden_size * self.model.skeleton.dtype.itemsize
        states = _STATES * len(self.measured) * MEASURED_TOKENS * token
        is_away = any(point.keeps_states_on_device for point in self.points)
        return found + (Memory(device=states) if is_away else Memory(host=states))

    def shortage(self) -> PlanError | None:
        """What is wrong if the curve does not fit into memory: a limit that was set or, without one, what is free."""
        needed, limits, room = self.memory, self.options.max_memory, self.points[0].device_room
        if room is not None and needed.device > room:
            whose = "are free" if not limits_device(self.points[0]) else "`max_memory` allows"
            return PlanError(
                f"the curve needs about {format_bytes(needed.device)} on {device_name(self.points[0])}, but "
                f"{format_bytes(room)} {whose} there.",
                hint="use fewer points or fewer `samples`, or `device='cpu'`",
                option="device",
            )
        limit = limit_of(limits, None)
        available = available_memory() if limit is None else limit
        if needed.host <= available:
            return None
        whose = "are available" if limit is None else "`max_memory` allows"
        return PlanError(
            f"the curve needs about {format_bytes(needed.host)} of memory, but {format_bytes(available)} {whose}.",
            hint="use fewer points or fewer `samples`, or set `max_memory` above the estimate",
            option="max_memory",
        )


def is_source(plan: ConversionPlan) -> bool:
    """Whether a point has all that the source has."""
    return plan.experts == plan.model.settings.experts and not plan.is_narrower


def plan_curve(source: Source, options: CurveOptions, *, device_room: int | None) -> CurvePlan:
    """Plans a curve from a source's config and headers; reads no weights.

    Args:
        source: The checkpoint.
        options: What to compare.
        device_room: Bytes of the accelerator that layers may use; ``None`` where they run on the host.

    Raises:
        HcsmoeError: If the model cannot have one of the sizes, or cannot be converted at all.
        PlanError: If the curve needs more memory than is free or ``max_memory`` allows. Where the device may be chosen,
            one that does not fit the accelerator is planned for the host.
    """
    found = _plan(source, options, device_room=device_room)
    shortage = found.shortage()
    if shortage is None:
        return found
    if device_room is None or options.device != Device.AUTO:
        raise shortage
    found = plan_curve(source, replace(options, device=Device.CPU), device_room=None)
    found.warnings.insert(0, fallback_warning(shortage))
    return found


def _plan(source: Source, options: CurveOptions, *, device_room: int | None) -> CurvePlan:
    if options.figure is not None and not has_matplotlib():
        raise PlanError("`figure` draws with matplotlib, which is not installed.", hint="pip install 'hcsmoe[plots]'")
    if options.statistics is not None and options.statistics.exists():
        raise PlanError(
            f"{options.statistics} exists, but a curve runs the model in any case.",
            hint="name another file for `statistics`, or leave it out",
        )
    first = _conversion(options)
    model = open_model(source, first, on_device=device_room is not None)
    first = _unpropagated(model, _as_long_as_a_refit(model, options, first, device_room=device_room))
    plans: dict[tuple[int, int], ConversionPlan] = {}
    for experts, width in _sizes(model, options, first):
        plan = plan_model(model, replace(first, experts=experts, expert_width=width), device_room=device_room)
        plans.setdefault((plan.experts, plan.width), plan)
    points = list(plans.values())
    warnings = dict.fromkeys(warning for plan in points if not is_source(plan) for warning in plan.warnings)
    return CurvePlan(
        options=options, points=points, measured=_measured(points, options.measure_points), warnings=list(warnings)
    )


def _conversion(options: CurveOptions) -> ConvertOptions:
    """The default conversion without a refit, to all that there is."""
    return ConvertOptions(
        expert_width=ALL,
        method=MethodOptions(refit=Refit.NONE),
        calibration=options.calibration,
        device=options.device,
        batch_tokens=options.batch_tokens,
        max_memory=options.max_memory,
        statistics=options.statistics,
        keep_states=options.keep_states,
    )


def _as_long_as_a_refit(
    model: SourceModel, options: CurveOptions, first: ConvertOptions, *, device_room: int | None
) -> ConvertOptions:
    """The same on as much text as a refit takes, if a later conversion is to read statistics of it."""
    if options.statistics is None or options.calibration.samples is not None:
        return first
    length = plan_model(model, first, device_room=device_room).calibration.sequence_length
    samples = default_samples(length, fits=True)
    return replace(first, calibration=replace(first.calibration, samples=samples))


def _unpropagated(model: SourceModel, first: ConvertOptions) -> ConvertOptions:
    """The same with every layer fitted to its inputs in the source, which all points share."""
    recipe, _ = suit_default(model, first)
    if not recipe.propagates:
        return first
    return replace(first, method=replace(first.method, propagate=Propagate.ORIGINAL))


def _sizes(model: SourceModel, options: CurveOptions, first: ConvertOptions) -> Iterator[tuple[int, int | str]]:
    """Number and width of the experts of every point."""
    experts, widths = options.experts, options.expert_width
    if not experts and not widths:
        experts, widths = _default_experts(model), tuple(_default_widths(model, first))
    return product(experts or (model.settings.experts,), widths or (ALL,))


def _default_experts(model: SourceModel) -> tuple[int, ...]:
    count, least = model.settings.experts, max(2, model.settings.experts_per_token)
    return tuple(dict.fromkeys((count, *(kept for kept in (count * 3 // 4, count // 2) if kept >= least))))


def _default_widths(model: SourceModel, first: ConvertOptions) -> Iterable[int | str]:
    """Those of the default widths that a model can have."""
    recipe, _ = suit_default(model, first)
    for width in DEFAULT_WIDTHS:
        try:
            shape = expert_shape(model, recipe, replace(first, expert_width=width))
        except PlanError:
            continue
        if width == ALL or shape.width < neurons_of(model):
            yield width


def _measured(points: Sequence[ConversionPlan], wanted: int | None) -> frozenset[int]:
    """Which points are measured: at even distances in size, the source besides, as it costs nothing."""
    others = [number for number, plan in enumerate(points) if not is_source(plan)]
    others.sort(key=lambda number: weight_bytes(points[number])["after"])
    count = len(others) if wanted is None else min(wanted, len(others))
    chosen = {others[round(place * (len(others) - 1) / max(1, count - 1))] for place in range(count)}
    return frozenset(chosen | set(range(len(points))) - set(others))
