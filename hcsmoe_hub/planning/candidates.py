"""Numbers and widths of experts that meet a target, with what each would weigh, from headers alone.

N experts of I neurons become K experts of W neurons.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from hcsmoe_hub.checkpoint.result_formats import ROUNDING, ROUTER_COUNTS, STEPS
from hcsmoe_hub.checkpoint.tensors import StoredTensor, total_bytes
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.machine.units import format_plural
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.model.width import ExpertWidth, find_width, neurons_of
from hcsmoe_hub.options import ConvertOptions, Dtype, Layout, Target
from hcsmoe_hub.planning.expert_shape import ExpertShape, fitting_widths
from hcsmoe_hub.planning.mtp_heads import mtp_rule
from hcsmoe_hub.planning.refusals import converted_layers, possible_counts
from hcsmoe_hub.planning.result_shapes import result_state
from hcsmoe_hub.planning.sizes import active_parameters_of
from hcsmoe_hub.planning.target import Candidate, describe, describe_limit
from hcsmoe_hub.planning.tensor_fates import take_account
from hcsmoe_hub.recipe.recipe import Recipe

# Widths are multiples of 64 where a model has at least so many of them.
LEAST_WIDTHS = 12
# Servers divide experts among devices: numbers of experts are multiples of 8 where a model has 64 or more.
SHARED_OUT = 8

Measure = Callable[[int, int], Candidate]


def find_candidates(
    model: SourceModel, recipe: Recipe, options: ConvertOptions, target: Target
) -> tuple[Candidate, ...]:
    """The shapes that meet a target, none of which another exceeds in both numbers; most experts first.

    Every number of experts has the greatest width under the target that kernels and quantisers are at ease with.

    Raises:
        PlanError: If no shape is as small as the target, or the source is.
    """
    neurons = neurons_of(model)
    narrowed = None if recipe.layout is not Layout.REDUCED else _width_of(model)
    widths = [neurons] if narrowed is None else _widths(narrowed, keeps_format=options.dtype is Dtype.SOURCE)
    counts = _counts(model, recipe, options)
    measure = _measuring(model, recipe, options, narrowed)
    whole, least = measure(model.settings.experts, neurons), measure(min(counts), min(widths))
    _check_reach(model, target, whole, least)
    wanted = _Widths(measure, target, counts, widths)
    found = [candidate for count in counts if (candidate := wanted.best(count)) is not None]
    return tuple(sorted(_undominated(found), key=lambda candidate: -candidate.shape.experts))


def _width_of(model: SourceModel) -> ExpertWidth | None:
    """How the width of a model's experts is set; ``None`` where they can only become fewer."""
    try:
        return find_width(model)
    except PlanError:
        return None


def _widths(narrowed: ExpertWidth, *, keeps_format: bool) -> list[int]:
    """Widths that experts can have, ascending: multiples of 64, or of less in small models, and the source's."""
    # Grouped products of torch need rows of multiples of 16 bytes.
    least = 8 if narrowed.size % 8 == 0 else 1
    step = next(step for step in STEPS if step <= 64 and (step <= least or narrowed.size // step >= LEAST_WIDTHS))
    found = set(range(step, narrowed.size + 1, step)) & set(fitting_widths(narrowed, keeps_format=keeps_format))
    return sorted(found | {narrowed.size})


def _counts(model: SourceModel, recipe: Recipe, options: ConvertOptions) -> list[int]:
    """Numbers of experts that the router allows, and servers where they load the result; ascending."""
    possible, experts = possible_counts(model, recipe, options), model.settings.experts
    if recipe.layout is not Layout.REDUCED:
        return possible
    if (known := ROUTER_COUNTS.get(model.source.config["model_type"])) is not None:
        return [count for count in possible if count in known or count == experts]
    step = next(step for step in (SHARED_OUT, 4, 2, 1) if step == 1 or experts // step >= SHARED_OUT)
    return [count for count in possible if count % step == 0 or count == experts] or possible


def _measuring(model: SourceModel, recipe: Recipe, options: ConvertOptions, narrowed: ExpertWidth | None) -> Measure:
    """Counts what a result of any K and W has, exactly."""
    layers, neurons = converted_layers(model, recipe), neurons_of(model)
    all_experts = {block.layer: model.settings.experts for block in model.blocks}
    per_token = options.experts_per_token or model.settings.experts_per_token

    @cache
    def measure(experts: int, width: int) -> Candidate:
        shape = ExpertShape(experts=experts, width=width, narrowed=None if width == neurons else narrowed)
        counts = all_experts | dict.fromkeys(layers, experts)
        state = result_state(model, counts, recipe.layout, shape)
        account = take_account(
            model,
            state,
            layout=recipe.layout,
            mtp=mtp_rule(model, recipe, options, keeps_all=shape.keeps_all(counts, model)),
            keep_format=options.dtype is Dtype.SOURCE,
        )
        kept = (name for name in model.placement.unused if name not in account.dropped)
        stored = [
            StoredTensor(name=name, dtype=dtype, shape=size, shard="", offset=0)
            for name, dtype, size in account.outputs
        ]
        return Candidate(
            shape=shape,
            parameters=model.count(state, kept),
            active=active_parameters_of(model, state, shape, per_token),
            weights_bytes=total_bytes(stored),
            ratio=experts * width / (model.settings.experts * neurons),
        )

    return measure


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plane:
    """What a target limits as a function of K and W: ``base + per_expert K + per_neuron W + per_both K W``."""

    base: float
    per_expert: float
    per_neuron: float
    per_both: float

    @classmethod
    def through(cls, uses: Callable[[int, int], float], counts: tuple[int, int], widths: tuple[int, int]) -> "_Plane":
        """The function that has the right values at four points, or at fewer where numbers are alike."""
        (few, many), (narrow, wide) = counts, widths
        rise, span = max(1, many - few), max(1, wide - narrow)
        slopes = [(uses(count, wide) - uses(count, narrow)) / span for count in counts]
        per_both = (slopes[1] - slopes[0]) / rise
        per_neuron = slopes[0] - per_both * few
        per_expert = (uses(many, wide) - uses(few, wide)) / rise - per_both * wide
        base = uses(few, wide) - per_expert * few - per_neuron * wide - per_both * few * wide
        return cls(base=base, per_expert=per_expert, per_neuron=per_neuron, per_both=per_both)

    def width(self, experts: int, limit: float) -> float:
        """The width at which so many experts reach a limit."""
        slope = self.per_neuron + self.per_both * experts
        room = limit - self.base - self.per_expert * experts
        return room / slope if slope > 0 else (float("inf") if room >= 0 else 0.0)


class _Widths:
    """Finds the greatest width of any number of experts under a target.

    Args:
        measure: Counts exactly what a result has.
        target: The limit.
        counts: Numbers of experts, ascending.
        widths: Widths, ascending.
    """

    def __init__(self, measure: Measure, target: Target, counts: Sequence[int], widths: Sequence[int]) -> None:
        self._measure, self._target, self._widths = measure, target, widths
        span = (widths[0], widths[-1])
        # With all experts a head may stay that fewer would drop.
        fewer = counts[:-1] or counts
        self._fewer = _Plane.through(self._uses, (fewer[0], fewer[-1]), span)
        self._all = _Plane.through(self._uses, (counts[-1], counts[-1]), span)
        self._most = counts[-1]

    def _uses(self, experts: int, width: int) -> float:
        return self._measure(experts, width).uses(self._target)

    def best(self, experts: int) -> Candidate | None:
        """The candidate with so many experts; ``None`` if even the narrowest are too much."""
        plane = self._all if experts == self._most else self._fewer
        # Half a neuron more, for rounding; what it adds up to is counted exactly.
        reach = plane.width(experts, self._target.limit) + 0.5
        below = [width for width in self._widths if width <= reach]
        while below:
            width = _handy(below, self._widths[-1])
            found = self._measure(experts, width)
            if found.uses(self._target) <= self._target.limit:
                return found
            below = [smaller for smaller in below if smaller < width]
        return None


def _handy(widths: Sequence[int], neurons: int) -> int:
    """Of widths that are allowed, the greatest one that is a multiple of 256, else of 128, and so on.

    A coarser multiple may cost a sixteenth of all neurons.
    """
    most = widths[-1]
    if most == neurons:
        return most
    for step in STEPS:
        fitting = [width for width in widths if width % step == 0]
        if fitting and most - fitting[-1] <= ROUNDING * neurons:
            return fitting[-1]
    return most


def _undominated(found: Iterable[Candidate]) -> list[Candidate]:
    """Candidates that no other has as many experts and as wide ones as."""
    kept = list(found)
    return [
        candidate
        for candidate in kept
        if not any(
            other is not candidate
            and other.shape.experts >= candidate.shape.experts
            and other.shape.width >= candidate.shape.width
            for other in kept
        )
    ]


def _check_reach(model: SourceModel, target: Target, whole: Candidate, least: Candidate) -> None:
    """Checks that a target lies between the smallest result and the source.

    Raises:
        PlanError: If it does not.
    """
    label, limit = model.source.label, describe_limit(target)
    if target.limit >= whole.uses(target):
        raise PlanError(
            f"{label} has {describe(target, whole.uses(target))} already, not more than the {limit} of "
            f"`{target.name}`.",
            hint=f"use a smaller `{target.name}`",
        )
    if target.limit < least.uses(target):
        shape = least.shape
        raise PlanError(
            f"no result of {label} has only {limit}: the smallest one, {shape.experts} experts of "
            f"{format_plural(shape.width, 'neuron')}, has {describe(target, least.uses(target))}.",
            hint=f"ask for at least that with `{target.name}`",
        )
