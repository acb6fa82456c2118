"""Where a wish was bent, or a second look at a plan is due."""

from hcsmoe_hub.checkpoint.config_json import MoESettings, quantization_method
from hcsmoe_hub.checkpoint.result_formats import router_warnings
from hcsmoe_hub.checkpoint.shards import has_adapter
from hcsmoe_hub.machine.units import format_plural
from hcsmoe_hub.model.mtp import has_experts
from hcsmoe_hub.model.raw_config import SAME_CODE, loading_problem
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.model.wrong_experts import wrong_experts_warning
from hcsmoe_hub.options import ConvertOptions, Dtype, Layout
from hcsmoe_hub.planning.expert_shape import ExpertShape
from hcsmoe_hub.planning.tensor_fates import Account
from hcsmoe_hub.recipe.recipe import Recipe

# What torch's grouped products of experts need rows to be multiples of; transformers uses them by default.
GROUPED_BYTES = 16


def plan_warnings(
    model: SourceModel,
    options: ConvertOptions,
    recipe: Recipe,
    after: MoESettings,
    shape: ExpertShape,
    account: Account,
) -> list[str]:
    before, experts, found = model.settings, shape.experts, list[str]()
    if model.source.renamed_from is not None:
        found.append(f"{model.source.renamed_from} has been renamed to {model.source.repo_id}.")
    if model.source.wrapper:
        found.append(
            f"the tensor names contain {model.source.wrapper!r}, which a wrapper of the model left there; the result "
            "is written without it, so that it loads."
        )
    if has_adapter(model.source.files()):
        found.append("the source has an adapter (adapter_config.json); the weights are converted without it.")
    if before.experts == experts and shape.narrowed is None and recipe.compress is None:
        asked = "experts" if options.experts else "expert_width"
        found.append(
            f"`{asked}={getattr(options, asked)}` keeps all that the model has; the result will not be smaller."
        )
    elif recipe.layout is Layout.FULL:
        found.append(
            "the full layout copies every merged expert to all members of its cluster; the result will not be smaller."
        )
    found += _width_warnings(model, shape)
    if before.groups != after.groups:
        found.append(
            f"{experts} experts cannot be split into {before.groups} groups: group-limited routing is switched "
            "off (one group)."
        )
    found += router_warnings(model.source.config["model_type"], after.experts, before.experts)
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
    named = None if model.is_quantized else quantization_method(model.source.config)
    # Often left over from another checkpoint.
    if named is not None:
        found.append(
            f"config.json says that the weights are quantised with {named!r}, but they are plain numbers; the "
            "result is written without that entry."
        )
    return found + _wrong_experts(model, recipe)


def _wrong_experts(model: SourceModel, recipe: Recipe) -> list[str]:
    # The modelling files of the other layouts run the right experts.
    is_plain = recipe.layout in (Layout.REDUCED, Layout.FULL)
    warning = wrong_experts_warning(model.source.config["model_type"]) if is_plain else None
    return [] if warning is None else [warning]


def _width_warnings(model: SourceModel, shape: ExpertShape) -> list[str]:
    row_bytes = shape.width * model.dtype.itemsize
    if shape.narrowed is None or row_bytes % GROUPED_BYTES == 0:
        return []
    return [
        f"rows of {shape.width} neurons take {row_bytes} bytes, but grouped products of torch need multiples of "
        f"{GROUPED_BYTES}: load the result with experts_implementation='eager', or choose a multiple of "
        f"{GROUPED_BYTES // model.dtype.itemsize} neurons."
    ]


def loading_warnings(model: SourceModel) -> list[str]:
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
