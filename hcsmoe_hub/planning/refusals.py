"""Whether a recipe fits a model: every refusal that needs both, before a weight byte is read."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from hcsmoe_hub.checkpoint.config_json import FIXED_TOP_K, MoESettings, check_counts
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.machine.versions import has_matplotlib
from hcsmoe_hub.model.expert_kinds import experts_of
from hcsmoe_hub.model.router import router_weight
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.options import (
    Budget,
    ConvertOptions,
    Dominant,
    Dtype,
    Layout,
    Method,
    Propagate,
    Refit,
    RouterPolicy,
    Saliency,
    Similarity,
)
from hcsmoe_hub.planning.factored_layout import factored_refusal
from hcsmoe_hub.planning.mapped_layout import mapped_refusal
from hcsmoe_hub.planning.statistics_use import check_text
from hcsmoe_hub.recipe.presets import DEFAULT_PRESET, starting_point
from hcsmoe_hub.recipe.recipe import Recipe
from hcsmoe_hub.recipe.resolve import resolve


def suit_default(model: SourceModel, options: ConvertOptions) -> tuple[Recipe, list[str]]:
    """The recipe of some options, where the default preset does without what the model does not allow.

    A choice that is given stays as it is, and so do those of other presets.

    Returns:
        The recipe, and a sentence on each choice of the preset that it does not follow.

    Raises:
        PlanError: If choices contradict each other.
    """
    recipe, method, notes = resolve(options.method), options.method, list[str]()
    if (method.preset or starting_point(method)) is not DEFAULT_PRESET:
        return recipe, notes
    for name, other, check in _CONCESSIONS:
        if getattr(method, name) is not None:
            continue
        try:
            check(model, recipe, options)
        except PlanError as error:
            notes.append(f"{DEFAULT_PRESET} converts with `{name}='{other}'` here: {error.message}")
            method = replace(method, preset=DEFAULT_PRESET, **{name: other})
            recipe = resolve(method)
    return recipe, notes


def check_recipe(model: SourceModel, recipe: Recipe, options: ConvertOptions, *, experts: int) -> MoESettings:
    """Checks everything about a recipe that depends on the model.

    Args:
        model: The source.
        recipe: The recipe.
        options: All other options.
        experts: K.

    Returns:
        Expert counts of the result's config.

    Raises:
        PlanError: If the recipe cannot be carried out on this model.
    """
    _check_layers(model, recipe)
    _check_layout(model, recipe, experts)
    if recipe.layout is Layout.FACTORED:
        _check_factored(model, options)
    _check_numbers(model, recipe, experts)
    _check_router(model, recipe)
    _check_sample(model, recipe, options)
    _check_refit(model, recipe)
    _check_propagation(model, recipe, options)
    _check_model_refit(model, recipe, options)
    if options.figure and not has_matplotlib():
        raise PlanError("`figure` draws with matplotlib, which is not installed.", hint="pip install 'hcsmoe[plots]'")
    return _check_router_rows(model, recipe, options, experts)


def possible_counts(model: SourceModel, recipe: Recipe, options: ConvertOptions) -> list[int]:
    """Numbers of experts that a recipe can leave and the router can choose from as it does in the source, ascending.

    Raises:
        PlanError: If not even all experts are such a number.
    """
    counts = range(1, model.settings.experts)
    after = {experts: _counts_after(model, recipe, options, experts) for experts in counts}
    found = [experts for experts in counts if (left := after[experts]) and left.groups == model.settings.groups]
    check_recipe(model, recipe, options, experts=model.settings.experts)
    return [*found, model.settings.experts]


def _counts_after(model: SourceModel, recipe: Recipe, options: ConvertOptions, experts: int) -> MoESettings | None:
    """Expert counts of a result of so many experts; ``None`` where the recipe or the router does not allow it."""
    try:
        _check_numbers(model, recipe, experts)
        return _check_router_rows(model, recipe, options, experts)
    except PlanError:
        return None


def _check_router_rows(model: SourceModel, recipe: Recipe, options: ConvertOptions, experts: int) -> MoESettings:
    fixed, per_token = model.settings.experts_per_token, options.experts_per_token
    if model.skeleton.config.model_type in FIXED_TOP_K and per_token not in (None, fixed):
        raise PlanError(
            f"`experts_per_token={per_token}` cannot be written: routers of {model.skeleton.config.model_type} always "
            f"choose {fixed} expert{'s' if fixed > 1 else ''}, and no key of the config says so.",
            hint="leave `experts_per_token` out",
        )
    # A router that keeps its N rows works with any number of experts behind them.
    rows = model.settings.experts if recipe.is_tied else experts
    return check_counts(model.settings, experts=rows, experts_per_token=per_token, label=model.source.label)


def converted_layers(model: SourceModel, recipe: Recipe) -> list[int]:
    """Decoder layers whose experts are converted, ascending."""
    return [block.layer for block in model.blocks if recipe.layers is None or block.layer in recipe.layers]


def _check_layers(model: SourceModel, recipe: Recipe) -> None:
    if recipe.layers is None:
        return
    layers = {block.layer for block in model.blocks}
    strangers = sorted(set(recipe.layers) - layers)
    if strangers or not recipe.layers:
        named = ", ".join(map(str, strangers)) or "none"
        raise PlanError(
            f"`layers` names {named}, but the MoE layers of {model.source.label} are {min(layers)} to {max(layers)}"
            f" ({len(layers)} of {len(model.skeleton.layers)} layers).",
            hint="name MoE layers only",
        )
    if not recipe.is_tied and layers - set(recipe.layers):
        raise PlanError(
            f"`layers` leaves {len(layers - set(recipe.layers))} MoE layers with all their experts, but the config "
            "of a stock model holds one number for all layers.",
            hint="add `layout='mapped'` or `layout='full'`, or leave `layers` out",
        )


def _check_layout(model: SourceModel, recipe: Recipe, experts: int) -> None:
    if not recipe.is_tied and recipe.budget is not Budget.UNIFORM:
        total = experts * len(converted_layers(model, recipe))
        raise PlanError(
            f"`budget='{recipe.budget}'` gives each layer its own number of experts, but the config of a stock model "
            f"holds one number for all. The nearest uniform plan keeps {experts} in each, {total} in all.",
            hint="use `layout='mapped'` or `layout='full'`, or `budget='uniform'`",
        )
    reason = mapped_refusal(model) if recipe.layout is Layout.MAPPED else None
    if reason is not None:
        raise PlanError(f"the mapped layout cannot hold {model.source.label}: {reason}.", hint="use `layout='full'`")
    if model.factors is not None:
        raise PlanError(
            f"{model.source.label} is a result of hcsmoe in the factored layout, whose experts have no matrices to "
            "merge.",
            hint="convert the source that its hcsmoe.json names",
        )
    if model.expert_map is not None:
        raise PlanError(
            f"{model.source.label} is a result of hcsmoe in the mapped layout, whose router rows share experts "
            "already.",
            hint="convert the source that its hcsmoe.json names",
        )


def _check_factored(model: SourceModel, options: ConvertOptions) -> None:
    """Checks that the matrices of a model's experts can become factors."""
    reason = factored_refusal(model)
    if reason is not None:
        raise PlanError(f"the factored layout cannot hold {model.source.label}: {reason}.", hint="leave `compress` out")
    if model.is_quantized and options.dtype is Dtype.SOURCE:
        raise PlanError(
            f"`compress` writes factors in plain numbers, but {model.source.label} is quantised, and its format has "
            "scales for whole matrices only.",
            hint="add `dtype='bfloat16'`",
        )


def _check_numbers(model: SourceModel, recipe: Recipe, experts: int) -> None:
    before, label = model.settings.experts, model.source.label
    lowest = 1 if recipe.is_tied else 2
    if not lowest <= experts <= before:
        why = f"it has only {before}" if experts > before else "a router needs at least 2"
        raise PlanError(
            f"cannot keep {experts} experts per layer of {label}: {why}.",
            hint=f"use `experts` with a number from {lowest} to {before}",
        )
    for layer, expert in recipe.protect:
        if not 0 <= expert < before or (layer is not None and layer not in {block.layer for block in model.blocks}):
            where = "every layer" if layer is None else f"layer {layer}"
            raise PlanError(
                f"`protect` names expert {expert} of {where}, which {label} does not have: its MoE layers have "
                f"experts 0 to {before - 1}.",
                hint="name experts as LAYER:EXPERT",
            )
    for layer in converted_layers(model, recipe):
        _check_layer_numbers(recipe, layer, experts, before)


def _check_layer_numbers(recipe: Recipe, layer: int, experts: int, before: int) -> None:
    protected = len(recipe.protected(layer))
    if protected > experts or (protected == experts < before and recipe.method is Method.MERGE):
        raise PlanError(
            f"`protect` keeps {protected} experts of layer {layer} apart, so the other {before - protected} would have "
            f"to become {experts - protected}.",
            hint=f"protect fewer, or use `experts={protected + 1}` or more",
        )
    limit, clusters = recipe.max_cluster_size, experts - protected
    if limit is not None and recipe.budget is Budget.UNIFORM and clusters * limit < before - protected:
        raise PlanError(
            f"{clusters} clusters of at most {limit} experts hold {clusters * limit}, but layer {layer} has "
            f"{before - protected} to place.",
            hint=f"use `max_cluster_size={-(-(before - protected) // clusters)}` or more, or more `experts`",
        )


def _check_router(model: SourceModel, recipe: Recipe) -> None:
    """Checks that there are router logits and rows to work with, where the recipe needs them."""
    rules: Mapping[str, bool] = {
        "`similarity='router-logits'`": Similarity.ROUTER_LOGITS in (recipe.similarity or ()),
        "`similarity='router-weight'`": Similarity.ROUTER_WEIGHT in (recipe.similarity or ()),
        "`dominant='routing-score'`": recipe.dominant is Dominant.ROUTING_SCORE,
        "`router='fit'`": recipe.fits_router,
        "`saliency='routing-score'`": recipe.saliency is Saliency.ROUTING_SCORE,
    }
    asked = [rule for rule, is_asked in rules.items() if is_asked]
    for block in model.blocks if asked else ():
        if router_weight(block, model.skeleton.state) is None:
            raise PlanError(
                f"{asked[0]} needs a router with one row per expert, which layer {block.layer} of "
                f"{model.source.label} does not have.",
                hint="use another choice",
            )
    tables = [block.layer for block in model.blocks if block.tables]
    if tables and recipe.method is Method.PRUNE:
        raise PlanError(
            f"layer {tables[0]} of {model.source.label} sends tokens to fixed experts by a table, which may "
            "name experts that pruning removes.",
            hint="use `method='merge'`",
        )


def _check_refit(model: SourceModel, recipe: Recipe) -> None:
    """Checks that an expert's output is a sum over its neurons times the router weight, as least squares need it."""
    if recipe.refit is not Refit.DOWN:
        return
    for block in model.blocks:
        experts = experts_of(model.skeleton.module.get_submodule(block.experts_path))
        if not experts.is_affine or experts.scales_input:
            place = "before an expert's first projection" if experts.scales_input else "after a norm"
            raise PlanError(
                f"`refit='{recipe.refit}'` fits sums of router weight times neuron, but in {model.source.label} the "
                f"weight is applied {place}.",
                hint="use `refit='block'` or `refit='none'`",
            )


def _check_propagation(model: SourceModel, recipe: Recipe, options: ConvertOptions) -> None:
    """Checks that the reduced model's hidden states can be computed along with the source's."""
    if recipe.propagates:
        check_text(options, "propagate='merged'", hint="`propagate='original'`")


def _check_model_refit(model: SourceModel, recipe: Recipe, options: ConvertOptions) -> None:
    """Checks that both models can be in memory at once, with text to run them on, and be written again."""
    if not recipe.refits_model:
        return
    if model.skeleton.is_encoder_decoder:
        raise PlanError(
            f"`refit='model'` trains a decoder on pieces of its text, but {model.source.label} reads one text with its "
            "encoder and writes another.",
            hint="use another `refit`, or train the result with 'hcsmoe recover'",
        )
    check_text(options, "refit='model'", hint="another `refit`")
    if options.low_disk:
        raise PlanError(
            "`low_disk` deletes downloaded shards once they are converted, but `refit='model'` reads the source again "
            "and changes shards that are written already.",
            hint="leave `low_disk` out, or use another `refit`",
        )
    if model.is_quantized and options.dtype is Dtype.SOURCE:
        raise PlanError(
            f"`refit='model'` trains plain weights, and does not round them to the quantised format of "
            f"{model.source.label}.",
            hint="add `dtype='bfloat16'`, or use another `refit`",
        )


def _scales_input(model: SourceModel) -> bool:
    """Whether the router weight multiplies the input of an expert, instead of its output."""
    module = model.skeleton.module
    return any(experts_of(module.get_submodule(block.experts_path)).scales_input for block in model.blocks)


def _check_sample(model: SourceModel, recipe: Recipe, options: ConvertOptions) -> None:
    """Checks what needs an MoE block that can be run on single tokens."""
    whole = [block.layer for block in model.blocks if block.is_whole_layer]
    asked = {
        "statistics": options.statistics is not None,
        f"budget='{recipe.budget}'": recipe.budget is not Budget.UNIFORM,
        "saliency='reconstruction'": recipe.saliency is Saliency.RECONSTRUCTION,
        "refit='model'": recipe.refit is Refit.MODEL,
    }
    for choice in [choice for choice, is_asked in asked.items() if is_asked] if whole else ():
        raise PlanError(
            f"`{choice}` runs the MoE block of a layer again on single tokens, but in {model.source.label} router and "
            "experts are part of the decoder layer itself.",
            hint=f"leave `{choice.partition('=')[0]}` out",
        )
    if recipe.saliency is Saliency.RECONSTRUCTION and _scales_input(model):
        raise PlanError(
            f"in {model.source.label} the router weight multiplies an expert's input, so its output differs for "
            "every subset of experts that the reconstruction error would try.",
            hint="use another `saliency`",
        )


# What the default preset gives up for a model, in the order in which each is tried.
_CONCESSIONS: tuple[tuple[str, Any, Callable[[SourceModel, Recipe, ConvertOptions], None]], ...] = (
    ("router", RouterPolicy.DOMINANT, lambda model, recipe, options: _check_router(model, recipe)),
    ("propagate", Propagate.ORIGINAL, _check_propagation),
)
