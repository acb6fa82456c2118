"""How many experts a result has, and how wide they are.

N experts of I neurons become K experts of W neurons.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hcsmoe_hub.checkpoint.result_formats import ROUNDING, round_width
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.model.blocks import ExpertTensor, MoEBlock
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.model.width import ExpertWidth, find_width, neurons_of
from hcsmoe_hub.options import ConvertOptions, Dtype, Layout
from hcsmoe_hub.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """Number and width of the experts of a result.

    Attributes:
        experts: K.
        width: W.
        narrowed: How the source's width is set; ``None`` where it stays.
    """

    experts: int
    width: int
    narrowed: ExpertWidth | None = None

    def keeps_all(self, experts_by_layer: Mapping[int, int], model: SourceModel) -> bool:
        """Whether every layer keeps all experts of a source with all of their neurons."""
        return self.narrowed is None and set(experts_by_layer.values()) == {model.settings.experts}

    def tensor(self, source: ExpertTensor) -> ExpertTensor:
        """Where experts lie in a tensor of the result."""
        along = None if self.narrowed is None else self.narrowed.tensors.get(source.name)
        # Where one dimension counts the neurons of all experts, each takes fewer of it.
        if self.narrowed is None or along is None or along.dim != source.dim:
            return source
        return replace(source, rows_per_expert=source.rows_per_expert // self.narrowed.size * self.width)

    def block(self, source: MoEBlock) -> MoEBlock:
        """The block of the result that takes the place of one of the source."""
        return replace(source, experts=tuple(map(self.tensor, source.experts)))


def expert_shape(model: SourceModel, recipe: Recipe, options: ConvertOptions) -> ExpertShape:
    """The shape that options ask for by numbers.

    Raises:
        PlanError: If the model cannot have experts of that width.
    """
    experts, neurons = options.experts or model.settings.experts, neurons_of(model)
    asked = options.expert_width
    wanted = neurons if asked is None else asked if isinstance(asked, int) else round(neurons * float(asked[:-1]) / 100)
    if wanted > neurons:
        raise PlanError(
            f"cannot keep {wanted} neurons per expert of {model.source.label}: it has {neurons}.",
            hint=f"use `expert_width` with a number up to {neurons}",
        )
    if wanted == neurons:
        return ExpertShape(experts=experts, width=neurons)
    found, keeps_format = _find(model, recipe), options.dtype is Dtype.SOURCE
    if not isinstance(asked, int):
        wanted = _nearest_share(found, wanted, keeps_format=keeps_format)
    if wanted == neurons:
        return ExpertShape(experts=experts, width=neurons)
    return _narrowed(model, found, experts, wanted, keeps_format=keeps_format)


def _find(model: SourceModel, recipe: Recipe) -> ExpertWidth:
    """How the width of the experts is set in the layout of a recipe."""
    if recipe.layout is not Layout.REDUCED:
        raise PlanError(
            "`expert_width` needs a config that says how wide experts are, but that of the "
            f"{recipe.layout} layout is the source's.",
            hint="leave `layout` out, or `expert_width`",
        )
    return find_width(model)


def _narrowed(model: SourceModel, found: ExpertWidth, experts: int, width: int, *, keeps_format: bool) -> ExpertShape:
    """The shape of a width that shared experts and the format of the weights allow."""
    fitting = fitting_widths(found, keeps_format=keeps_format)
    if width in fitting:
        return ExpertShape(experts=experts, width=width, narrowed=found)
    if not found.takes(width):
        why = (
            f"its shared experts are {found.shared * found.size} wide, which config.json gives as {found.shared_key} "
            f"times {found.key}"
        )
    else:
        why = f"its weights are stored in blocks of {found.step} neurons"
    near = sorted(sorted(fitting, key=lambda number: abs(number - width))[:2])
    use = f"use `expert_width={' or '.join(map(str, near))}`" if near else "leave `expert_width` out"
    another = "" if found.stores(width) or not keeps_format else ", or `dtype='bfloat16'`"
    raise PlanError(
        f"experts of {model.source.label} cannot be {width} neurons wide: {why}.",
        hint=use + another,
    )


def fitting_widths(found: ExpertWidth, *, keeps_format: bool) -> list[int]:
    """All widths below the source's that shared experts and the format of the weights allow."""
    widths = range(1, found.size)
    return [width for width in widths if found.takes(width) and (not keeps_format or found.stores(width))]


def _nearest_share(found: ExpertWidth, width: int, *, keeps_format: bool) -> int:
    """The width that a share of the neurons stands for: a round one nearby or, if it does not fit, the nearest."""
    rounded = round_width(width, found.size)
    fitting = fitting_widths(found, keeps_format=keeps_format)
    if rounded == found.size or rounded in fitting:
        return rounded
    near = [number for number in fitting if abs(number - width) <= ROUNDING * found.size]
    return min(near, key=lambda number: abs(number - width), default=rounded)
