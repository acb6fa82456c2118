"""Turns a source's config and headers and the options into a plan, or refuses: no weight byte is read here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hcsmoe_hub.calibration.text import CalibrationPlan, plan_calibration
from hcsmoe_hub.checkpoint import config_json
from hcsmoe_hub.checkpoint.config_json import MoESettings
from hcsmoe_hub.checkpoint.sidecars import has_tokenizer, sidecar_files
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.checkpoint.writer import is_occupied, lay_out
from hcsmoe_hub.errors import OutputError, PlanError
from hcsmoe_hub.machine.device import default_batch_tokens
from hcsmoe_hub.machine.units import format_bytes
from hcsmoe_hub.methods.clustering import frequency_budget
from hcsmoe_hub.model.architectures import REPORT_HINT
from hcsmoe_hub.model.skeleton import Skeleton, quantization_method
from hcsmoe_hub.model.source_model import SourceModel, read_model
from hcsmoe_hub.observation.statistics_file import StatisticsFile
from hcsmoe_hub.options import Budget, ConvertOptions, Layout
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.disk_space import check_disks, existing_part
from hcsmoe_hub.planning.estimate import estimate_needs
from hcsmoe_hub.planning.refusals import check_recipe, converted_layers
from hcsmoe_hub.planning.result_shapes import result_state
from hcsmoe_hub.planning.tensor_fates import Account, take_account
from hcsmoe_hub.recipe.recipe import Recipe
from hcsmoe_hub.recipe.resolve import resolve


def make_plan(source: Source, options: ConvertOptions, *, on_device: bool = False) -> ConversionPlan:
    """Plans a conversion.

    Args:
        source: The checkpoint.
        options: What to do with it.
        on_device: Whether layers run on an accelerator.

    Raises:
        HcsmoeError: Every refusal of a conversion happens here.
    """
    recipe = resolve(options.method)
    model = read_model(source)
    _check_device(model, on_device=on_device)
    after = check_recipe(model, recipe, options)
    statistics = _find_statistics(model, options)
    counts, is_final = _experts_by_layer(model, recipe, options.experts, after, statistics)
    state = result_state(model, counts, recipe.layout)
    reduced = None if recipe.is_tied else Skeleton(_edited_config(model, after), model.skeleton.dtype)
    if reduced is not None:
        _check_reduced(model, reduced, state, after)
    account = take_account(
        model, state, layout=recipe.layout, keep_mtp=set(counts.values()) == {model.settings.experts}
    )
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
        config=_edited_config(model, after, without_mtp=bool(account.dropped)),
        sidecars=sidecar_files(source.files()),
        calibration=_plan_calibration(model, options, recipe, statistics),
        feature_tokens=options.calibration.feature_tokens if statistics is None else statistics.feature_tokens,
        statistics=statistics,
        on_device=on_device,
        batch_tokens=options.batch_tokens or default_batch_tokens(on_device=on_device),
        output=options.output or Path(f"{source.name}-hcsmoe-{options.experts}e"),
        warnings=_warnings(model, options, recipe, after, account),
    )
    _check_room(plan)
    return plan


def _find_statistics(model: SourceModel, options: ConvertOptions) -> StatisticsFile | None:
    """Statistics to reuse, ``None`` if the model has to run."""
    if options.statistics is None or not options.statistics.exists():
        return None
    found = StatisticsFile(options.statistics)
    found.check(model, options.calibration)
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
    return plan_calibration(
        options.calibration,
        max_positions=getattr(model.skeleton.config, "max_position_embeddings", None),
        has_tokenizer=has_tokenizer(model.source.files()),
        label=model.source.label,
        fits=recipe.refits,
    )


def _edited_config(model: SourceModel, after: MoESettings, *, without_mtp: bool = False) -> dict[str, Any]:
    return config_json.edit(
        model.source.config,
        model.skeleton.config,
        model.settings,
        after,
        without_mtp=without_mtp,
        without_quantization=model.skeleton.quantizer is not None,
    )


def _check_device(model: SourceModel, *, on_device: bool) -> None:
    if on_device and getattr(model.skeleton.config, "num_kv_shared_layers", None):
        raise PlanError(
            f"layers of {model.source.label} pass keys and values to each other, which works on one device only.",
            hint="use `device='cpu'`",
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
    if account.dropped:
        found.append(f"{len(account.dropped)} tensors of multi-token prediction layers are dropped.")
    if model.skeleton.quantizer is not None:
        method = quantization_method(model.source.config)
        found.append(f"the source is quantised with {method}; the result is written in bfloat16.")
    return found


def _check_room(plan: ConversionPlan) -> None:
    """Checks the output folder, the free disks and the memory limit.

    Raises:
        OutputError: If there is no room for the result or the download.
        PlanError: If the estimated peak is above the limit.
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
    needs = estimate_needs(plan)
    check_disks(plan, needs)
    limit = plan.options.max_memory_bytes
    if limit is not None and needs.memory_bytes > limit:
        raise PlanError(
            f"the conversion needs about {format_bytes(needs.memory_bytes)} of memory, more than the "
            f"{format_bytes(limit)} of `max_memory_bytes`.",
            hint="use fewer `samples` or a smaller `batch_tokens`, or raise `max_memory_bytes`",
        )
