"""Turns a source's config and headers and the options into a plan, or refuses: no weight byte is read here."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcsmoe_hub.calibration.plan import CalibrationPlan, plan_calibration
from hcsmoe_hub.calibration.sources import SELF
from hcsmoe_hub.checkpoint import config_json
from hcsmoe_hub.checkpoint.config_json import MoESettings, quantization_method
from hcsmoe_hub.checkpoint.shards import has_adapter
from hcsmoe_hub.checkpoint.sidecars import has_tokenizer, left_files, sidecar_files
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.checkpoint.tensors import INDEX_FILE
from hcsmoe_hub.checkpoint.writer import is_occupied, lay_out
from hcsmoe_hub.errors import OutputError, PlanError
from hcsmoe_hub.machine.device import compute_dtype, default_batch_tokens
from hcsmoe_hub.machine.units import format_plural
from hcsmoe_hub.methods.clustering import frequency_budget
from hcsmoe_hub.model.architectures import REPORT_HINT
from hcsmoe_hub.model.mtp import has_experts
from hcsmoe_hub.model.raw_config import SAME_CODE, loading_problem
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.model.source_model import SourceModel, read_model
from hcsmoe_hub.observation.statistics_file import StatisticsFile
from hcsmoe_hub.options import Budget, ConvertOptions, Dtype, Layout, Mtp
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.disk_space import existing_part
from hcsmoe_hub.planning.estimate import estimate_needs
from hcsmoe_hub.planning.memory import memory_refusal
from hcsmoe_hub.planning.output_place import check_place
from hcsmoe_hub.planning.refusals import check_recipe, converted_layers, suit_default
from hcsmoe_hub.planning.result_shapes import result_state
from hcsmoe_hub.planning.room import room_warnings
from hcsmoe_hub.planning.tensor_fates import Account, MtpRule, take_account
from hcsmoe_hub.recipe.recipe import Recipe
from hcsmoe_hub.recipe.resolve import resolve


def make_plan(
    source: Source, options: ConvertOptions, *, on_device: bool = False, compute: torch.dtype | None = None
) -> ConversionPlan:
    """Plans a conversion.

    Args:
        source: The checkpoint.
        options: What to do with it.
        on_device: Whether layers run on an accelerator.
        compute: Dtype in which bfloat16 weights are computed with; ``None`` for the one that the device is fast at.

    Raises:
        HcsmoeError: Every refusal of a conversion happens here, but for a machine without room for it: that is a
            warning of the plan, and refused by ``check_room`` when the conversion begins.
    """
    recipe = resolve(options.method)
    check_place(_output(source, options))
    compute = compute or compute_dtype(torch.device("cuda" if on_device else "cpu"))
    model = read_model(source, with_mtp=_keeps_mtp(recipe, options), compute=compute)
    _check_device(model, on_device=on_device)
    _check_dtype(model, options)
    recipe, notes = suit_default(model, options)
    after = check_recipe(model, recipe, options)
    statistics = _find_statistics(model, recipe, options)
    counts, is_final = _experts_by_layer(model, recipe, options.experts, after, statistics)
    state, keep_format = result_state(model, counts, recipe.layout), options.dtype is Dtype.SOURCE
    reduced = None if recipe.is_tied else _reduced(model, after)
    if reduced is not None:
        _check_reduced(model, reduced, state, after)
    mtp = _mtp_rule(model, recipe, options, counts)
    account = take_account(model, state, layout=recipe.layout, mtp=mtp, keep_format=keep_format)
    sidecars = _sidecars(source, source.files())
    plan = ConversionPlan(
        model=model,
        options=options,
        recipe=recipe,
        settings=after,
        experts_by_layer=counts,
        is_final=is_final,
        state=state,
        reduced=reduced,
        account=account,
        shards=lay_out(account.outputs, max_shard_size=options.max_shard_size),
        config=_edited_config(model, after, without_mtp=bool(account.dropped), keep_format=keep_format),
        sidecars=sidecars,
        left_files=left_files(source.files(), _used_files(source, sidecars)),
        calibration=_plan_calibration(model, options, recipe, statistics),
        feature_tokens=options.calibration.feature_tokens if statistics is None else statistics.feature_tokens,
        statistics=statistics,
        on_device=on_device,
        batch_tokens=options.batch_tokens or default_batch_tokens(on_device=on_device),
        output=_output(source, options),
        warnings=_warnings(model, options, recipe, after, account) + _loading_warnings(model) + notes,
    )
    _check_output(plan)
    refusal = memory_refusal(plan, estimate_needs(plan))
    if refusal is not None:
        raise refusal
    plan.warnings += room_warnings(plan)
    return plan


def _output(source: Source, options: ConvertOptions) -> Path:
    return options.output or Path(f"{source.name}-hcsmoe-{options.experts}e")


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
    return options.mtp is Mtp.KEEP and recipe.layout is not Layout.MAPPED


def _mtp_rule(model: SourceModel, recipe: Recipe, options: ConvertOptions, counts: Mapping[int, int]) -> MtpRule:
    """What becomes of MTP heads that the model does not load.

    Raises:
        PlanError: If there is none to drop.
    """
    if options.mtp is Mtp.DROP:
        if not model.mtp_keys:
            raise PlanError(
                f"`mtp='drop'` has nothing to drop: {model.source.label} stores no MTP head.", hint="leave `mtp` out"
            )
        return MtpRule(dropped="MTP head, dropped as `mtp='drop'` asks")
    # The config of a mapped result still has the N router rows that a head in its original form has.
    return MtpRule(fits=recipe.layout is Layout.MAPPED or set(counts.values()) == {model.settings.experts})


def _find_statistics(model: SourceModel, recipe: Recipe, options: ConvertOptions) -> StatisticsFile | None:
    """Statistics to reuse, ``None`` if the model has to run."""
    if options.statistics is None or not options.statistics.exists():
        return None
    found = StatisticsFile(options.statistics)
    found.check(model, options.calibration)
    found.check_scores(recipe)
    return found


def _experts_by_layer(
    model: SourceModel, recipe: Recipe, experts: int, after: MoESettings, statistics: StatisticsFile | None
) -> tuple[dict[int, int], bool]:
    """Experts that each MoE layer will have left, and whether that is final."""
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


def _edited_config(
    model: SourceModel, after: MoESettings, *, without_mtp: bool = False, keep_format: bool = True
) -> dict[str, Any]:
    return config_json.edit(
        model.source.config,
        model.skeleton.text_config,
        model.settings,
        after,
        without_mtp=without_mtp,
        # Settings that are left over from another checkpoint describe no tensor.
        without_quantization=not (model.is_quantized and keep_format),
    )


def _reduced(model: SourceModel, after: MoESettings) -> Skeleton:
    """The result as a model without weights."""
    return Skeleton(_edited_config(model, after), model.skeleton.dtype, mtp=model.skeleton.mtp)


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


def _check_reduced(model: SourceModel, reduced: Skeleton, state: Mapping[str, Tensor], after: MoESettings) -> None:
    """Checks that the edited config describes exactly the tensors that the conversion will produce."""
    is_same_top_k = model.settings.experts_per_token == after.experts_per_token
    for name, tensor in state.items():
        found = list(reduced.state[name].shape) if name in reduced.state else "no tensor at all"
        if found != list(tensor.shape):
            raise PlanError(
                f"with {after.experts} experts and {after.experts_per_token} per token the model would need {found} "
                f"for {name}, the conversion makes {list(tensor.shape)}.",
                hint=REPORT_HINT if is_same_top_k else "keep `experts_per_token` as it is",
            )


def _warnings(
    model: SourceModel, options: ConvertOptions, recipe: Recipe, after: MoESettings, account: Account
) -> list[str]:
    before, experts, found = model.settings, options.experts, list[str]()
    if model.source.renamed_from is not None:
        found.append(f"{model.source.renamed_from} has been renamed to {model.source.repo_id}.")
    if model.source.wrapper:
        found.append(
            f"the tensor names contain {model.source.wrapper!r}, which a wrapper of the model left there; the result "
            "is written without it, so that it loads."
        )
    if has_adapter(model.source.files()):
        found.append("the source has an adapter (adapter_config.json); the weights are converted without it.")
    if before.experts == experts:
        found.append(f"`experts={experts}` is the number that the model has; the result will not be smaller.")
    elif recipe.layout is Layout.FULL:
        found.append(
            "the full layout copies every merged expert to all members of its cluster; the result will not be smaller."
        )
    if before.groups != after.groups:
        found.append(
            f"{experts} experts cannot be split into {before.groups} groups: group-limited routing is switched "
            "off (one group)."
        )
    if after.experts == after.experts_per_token < before.experts:
        found.append(f"all {after.experts} experts will be active for every token: the layers become dense.")
    if recipe.layout is Layout.MAPPED and before.experts != experts and has_experts(model.mtp_keys):
        found.append(f"the mapped layout keeps the MTP head as it is, with all {before.experts} experts.")
    if account.dropped:
        reason = next(iter(account.dropped.values()))
        found.append(f"{format_plural(len(account.dropped), 'tensor')} dropped: {reason}.")
    if model.is_quantized and options.dtype is Dtype.BFLOAT16:
        method = quantization_method(model.source.config)
        how = f" with {method}" if method else ""
        found.append(f"the source is quantised{how}; the result is written in bfloat16.")
    return found


def _loading_warnings(model: SourceModel) -> list[str]:
    published = model.source.config["model_type"]
    if published in SAME_CODE:
        return [
            f"transformers knows model_type {published!r} as {SAME_CODE[published]!r} only. config.json keeps it for "
            "other programs; to load the result with transformers, change it there."
        ]
    problem = loading_problem(model.source.config)
    if problem is None:
        return []
    return [f"config.json stays as it is, but transformers cannot load a checkpoint with it: {problem}."]


def _check_output(plan: ConversionPlan) -> None:
    """Checks that the output folder can be made, and that nothing is lost there.

    Raises:
        OutputError: If it cannot, or something would be.
    """
    output, overwrite = plan.output, plan.options.overwrite
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file.", hint="choose another folder with `output`")
    source_path = plan.model.source.path
    if source_path is not None and output.resolve() == source_path.resolve():
        raise OutputError(f"{output} is the source itself.", hint="choose another folder with `output`")
    if is_occupied(output):
        is_checkpoint = (output / "config.json").exists() or any(output.glob("*.safetensors*"))
        if not overwrite:
            raise OutputError(
                f"{output} is not empty.", hint="choose another folder with `output`, or add `overwrite=True`"
            )
        if not is_checkpoint:
            raise OutputError(
                f"{output} holds files but no checkpoint, so `overwrite` does not touch it.",
                hint="choose another folder with `output`",
            )
    existing = existing_part(output)
    if not existing.is_dir():
        raise OutputError(
            f"{existing} is a file, so {output} cannot be made.", hint="choose another folder with `output`"
        )
