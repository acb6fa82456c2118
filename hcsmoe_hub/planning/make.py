"""Turns a source's config and headers and the options into a plan, or refuses: no weight byte is read here."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from hcsmoe_hub.calibration.plan import CalibrationPlan, plan_calibration
from hcsmoe_hub.calibration.sources import SELF
from hcsmoe_hub.checkpoint.config_json import MoESettings
from hcsmoe_hub.checkpoint.sidecars import has_tokenizer, left_files, sidecar_files
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.checkpoint.tensors import INDEX_FILE
from hcsmoe_hub.checkpoint.writer import lay_out
from hcsmoe_hub.errors import PlanError
from hcsmoe_hub.machine import accelerator
from hcsmoe_hub.machine.device import compute_dtype, default_batch_tokens
from hcsmoe_hub.methods.clustering import LossTable, frequency_budget
from hcsmoe_hub.model.source_model import SourceModel, read_model
from hcsmoe_hub.observation.statistics_file import StatisticsFile
from hcsmoe_hub.options import Budget, ConvertOptions, Device, Dtype, Layout, Mtp
from hcsmoe_hub.planning.candidates import find_candidates
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.estimate import estimate_needs
from hcsmoe_hub.planning.expert_shape import ExpertShape, expert_shape
from hcsmoe_hub.planning.like import Like, like_options
from hcsmoe_hub.planning.like_fit import fit_like, like_notes
from hcsmoe_hub.planning.memory import device_shortage, fallback_warning, memory_refusal
from hcsmoe_hub.planning.mtp_heads import mtp_rule
from hcsmoe_hub.planning.output_place import check_output, check_place
from hcsmoe_hub.planning.placement import placed
from hcsmoe_hub.planning.plan_warnings import loading_warnings, plan_warnings
from hcsmoe_hub.planning.refusals import check_recipe, converted_layers, suit_default
from hcsmoe_hub.planning.result_config import factored_skeleton, reduced_skeleton, result_config
from hcsmoe_hub.planning.result_shapes import result_state
from hcsmoe_hub.planning.room import room_warnings
from hcsmoe_hub.planning.statistics_use import find_statistics, statistics_notes
from hcsmoe_hub.planning.target import TargetPlan, file_label
from hcsmoe_hub.planning.tensor_fates import take_account
from hcsmoe_hub.recipe.recipe import Recipe
from hcsmoe_hub.recipe.resolve import resolve


def make_plan(
    source: Source,
    options: ConvertOptions,
    *,
    device_room: int | None = None,
    compute: torch.dtype | None = None,
    like: Like | None = None,
    losses: Mapping[int, LossTable] | None = None,
) -> ConversionPlan:
    """Plans a conversion.

    Args:
        source: The checkpoint.
        options: What to do with it.
        device_room: Bytes of the accelerator that layers may use; ``None`` where they run on the host.
        compute: Dtype in which bfloat16 weights are computed with; ``None`` for the one that the device is fast at.
        like: The other conversion that the options name, opened.
        losses: What fewer and narrower experts lose, by layer, by which the shape under a target is chosen; ``None`` if
            nobody has observed the model, or statistics say so.

    Raises:
        HcsmoeError: Every refusal of a conversion happens here, but for a machine without room for it: that is a
            warning of the plan, and refused by ``check_room`` when the conversion begins. Where the device may be
            chosen, a conversion that does not fit the accelerator is planned for the host.
    """
    asked = options
    options = options if like is None else like_options(like, options)
    model = open_model(source, options, on_device=device_room is not None, compute=compute)
    plan = plan_model(model, options, device_room=device_room, like=like, losses=losses)
    needs = estimate_needs(plan)
    shortage = device_shortage(plan, needs)
    if shortage is not None and options.device == Device.AUTO:
        found = make_plan(source, replace(asked, device=Device.CPU), compute=compute, like=like, losses=losses)
        found.warnings.insert(0, fallback_warning(shortage))
        return found
    check_place(plan.output)
    check_output(plan)
    refusal = memory_refusal(plan, needs)
    if refusal is not None:
        raise refusal
    plan.warnings += statistics_notes(plan) + room_warnings(plan)
    return plan


def open_model(
    source: Source, options: ConvertOptions, *, on_device: bool, compute: torch.dtype | None = None
) -> SourceModel:
    """Reads config and headers of a source as a conversion needs them; arguments are those of ``make_plan``."""
    compute = compute or compute_dtype(accelerator.place(on_device=on_device))
    model = read_model(source, with_mtp=_keeps_mtp(resolve(options.method), options), compute=compute)
    _check_device(model, on_device=on_device)
    _check_dtype(model, options)
    return model


def plan_model(
    model: SourceModel,
    options: ConvertOptions,
    *,
    device_room: int | None,
    like: Like | None = None,
    losses: Mapping[int, LossTable] | None = None,
) -> ConversionPlan:
    """Plans a conversion of a model that is read already, without a look at this machine.

    Args:
        model: The source, with the MTP head that the conversion keeps.
        options: What to do with it.
        device_room, like, losses: As for ``make_plan``.

    Raises:
        HcsmoeError: If the model cannot be converted like that.
    """
    like = None if like is None else fit_like(like, model)
    recipe, notes = suit_default(model, options) if like is None else (resolve(options.method), like_notes(like))
    statistics = find_statistics(model, recipe, options)
    target = _plan_target(model, recipe, options, statistics, losses)
    shape = expert_shape(model, recipe, options) if target is None else target.shape
    after = check_recipe(model, recipe, options, experts=shape.experts)
    counts, is_final = _experts_by_layer(model, recipe, shape.experts, after, statistics, like)
    state = result_state(model, counts, recipe.layout, shape)
    factored = factored_skeleton(model, recipe, after, shape)
    mtp = mtp_rule(model, recipe, options, keeps_all=shape.keeps_all(counts, model))
    stored = state if factored is None else factored.state
    account = take_account(model, stored, layout=recipe.layout, mtp=mtp, keep_format=options.dtype is Dtype.SOURCE)
    sidecars = _sidecars(model.source, model.source.files())
    found = ConversionPlan(
        model=model,
        options=options,
        recipe=recipe,
        settings=after,
        shape=shape,
        experts_by_layer=counts,
        target=target,
        is_final=is_final and (target is None or target.chosen is not None),
        state=state,
        reduced=None if recipe.is_tied else reduced_skeleton(model, state, after, shape),
        factored=factored,
        account=account,
        shards=lay_out(account.outputs, max_shard_size=options.max_shard_size),
        config=result_config(model, after, shape, account, factored),
        sidecars=sidecars,
        left_files=left_files(model.source.files(), _used_files(model.source, sidecars)),
        calibration=_plan_calibration(model, options, recipe, statistics),
        feature_tokens=options.calibration.feature_tokens if statistics is None else statistics.feature_tokens,
        statistics=statistics,
        device_room=device_room,
        batch_tokens=options.batch_tokens or default_batch_tokens(on_device=device_room is not None),
        output=_output(model.source, options, shape),
        warnings=plan_warnings(model, options, recipe, after, shape, account) + loading_warnings(model) + notes,
        like=like,
    )
    return placed(found)


def _plan_target(
    model: SourceModel,
    recipe: Recipe,
    options: ConvertOptions,
    statistics: StatisticsFile | None,
    losses: Mapping[int, LossTable] | None,
) -> TargetPlan | None:
    """The shapes that meet a target, and which of them loses least if that is known; ``None`` without a target."""
    if options.target is None:
        return None
    found = TargetPlan(target=options.target, candidates=find_candidates(model, recipe, options, options.target))
    if losses is None and statistics is not None:
        losses = statistics.losses()
    return found if losses is None else found.decided(losses)


def _output(source: Source, options: ConvertOptions, shape: ExpertShape) -> Path:
    if options.target is not None:
        return options.output or Path(f"{source.name}-hcsmoe-{file_label(options.target)}")
    width = "" if shape.narrowed is None else f"-{shape.width}w"
    return options.output or Path(f"{source.name}-hcsmoe-{shape.experts}e{width}")


def _sidecars(source: Source, files: list[str]) -> list[str]:
    """Names of the files that are copied; those that are here are opened.

    Raises:
        SourceError: If one of them is a Git LFS pointer.
    """
    sidecars = sidecar_files(files, source.loose_text)
    for file in sidecars:
        if source.is_local(file):
            source.fetch(file)
    return sidecars


def _used_files(source: Source, sidecars: list[str]) -> set[str]:
    index = [] if source.index is None else [INDEX_FILE]
    return {"config.json", *index, *source.shards, *sidecars}


def _keeps_mtp(recipe: Recipe, options: ConvertOptions) -> bool:
    """Whether an MTP head can be a decoder layer of the result, to whose experts the same happens."""
    return options.mtp is Mtp.KEEP and recipe.layout not in (Layout.MAPPED, Layout.FACTORED)


def _experts_by_layer(
    model: SourceModel,
    recipe: Recipe,
    experts: int,
    after: MoESettings,
    statistics: StatisticsFile | None,
    like: Like | None,
) -> tuple[dict[int, int], bool]:
    """Experts that each MoE layer will have left, and whether that is final."""
    if like is not None:
        return like.experts_by_layer(block.layer for block in model.blocks), True
    counts = {block.layer: model.settings.experts for block in model.blocks}
    layers = converted_layers(model, recipe)
    if recipe.budget is Budget.UNIFORM or statistics is None:
        counts |= dict.fromkeys(layers, experts)
        return counts, recipe.budget is Budget.UNIFORM
    usage = statistics.usage()
    least = after.experts_per_token if recipe.budget is Budget.FREQUENCY else 1
    floors = [_floor(recipe, layer, least, model.settings.experts) for layer in layers]
    budget = frequency_budget([usage[layer].tolist() for layer in layers], experts, floors)
    return counts | dict(zip(layers, budget, strict=True)), True


def _floor(recipe: Recipe, layer: int, least: int, experts: int) -> int:
    """Fewest clusters of a layer: room for protected experts, for the size limit, and for what a token chooses."""
    protected = len(recipe.protected(layer))
    limit = recipe.max_cluster_size or experts
    others = -(-(experts - protected) // limit)
    return max(least, protected + others)


def _plan_calibration(
    model: SourceModel, options: ConvertOptions, recipe: Recipe, statistics: StatisticsFile | None
) -> CalibrationPlan:
    if statistics is not None:
        return statistics.calibration
    planned = plan_calibration(
        options.calibration,
        max_positions=getattr(model.skeleton.text_config, "max_position_embeddings", None),
        has_tokenizer=has_tokenizer(model.source.files()),
        label=model.source.label,
        fits=recipe.refits,
        is_encoder_decoder=model.skeleton.is_encoder_decoder,
    )
    if model.skeleton.mtp is not None and planned.sequence_length == 1:
        raise PlanError(
            f"the MTP head of {model.source.label} takes a token and the next one, but a sequence has one token only.",
            hint="use a longer `sequence_length`, or `mtp='drop'`",
        )
    if any(source.location == SELF for source in planned.sources):
        _check_self(model, options)
    return replace(planned, measures=options.measure)


def _check_self(model: SourceModel, options: ConvertOptions) -> None:
    """Checks that the source can be loaded as a whole, to write calibration text itself."""
    server = "serve it elsewhere and pass the server as `dataset='http://HOST:PORT/v1'`"
    if options.low_disk:
        raise PlanError(
            "`dataset='self'` loads the whole source, but `low_disk` keeps two layers of it on disk at a time.",
            hint=f"leave `low_disk` out, or {server}",
        )
    if model.is_quantized:
        raise PlanError(
            f"`dataset='self'` loads the whole source, but the quantised weights of {model.source.label} are only "
            "decoded layer by layer.",
            hint=f"{server}, or use another text for `dataset`",
        )


def _check_device(model: SourceModel, *, on_device: bool) -> None:
    if on_device and getattr(model.skeleton.text_config, "num_kv_shared_layers", None):
        raise PlanError(
            f"layers of {model.source.label} pass keys and values to each other, which works on one device only.",
            hint="use `device='cpu'`",
        )


def _check_dtype(model: SourceModel, options: ConvertOptions) -> None:
    if options.dtype is Dtype.BFLOAT16 and not model.is_quantized and model.dtype != torch.bfloat16:
        raise PlanError(
            f"`dtype='bfloat16'` decodes quantised weights, but those of {model.source.label} are plain "
            f"{str(model.dtype).removeprefix('torch.')}.",
            hint="leave `dtype` out: the result has the dtype of the source",
        )
