"""Turns a source's config and headers and the options into a plan, or refuses: no weight byte is read here."""

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hcsmoe_hub.calibration.text import CalibrationPlan, plan_calibration
from hcsmoe_hub.checkpoint import config_json
from hcsmoe_hub.checkpoint.accounting import Account, check_against_config, take_account
from hcsmoe_hub.checkpoint.config_json import MoESettings
from hcsmoe_hub.checkpoint.sidecars import has_tokenizer, sidecar_files
from hcsmoe_hub.checkpoint.skeleton import Group, Skeleton, build_config, quantization_method
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.checkpoint.tensors import total_bytes
from hcsmoe_hub.checkpoint.writer import ShardLayout, lay_out
from hcsmoe_hub.device import default_batch_tokens
from hcsmoe_hub.errors import OutputError, PlanError, UnsupportedModelError
from hcsmoe_hub.estimate import LayerCost, Needs, estimate
from hcsmoe_hub.moe.architectures import ARCHITECTURES
from hcsmoe_hub.moe.blocks import MoEBlock, compare, find_blocks
from hcsmoe_hub.options import ConvertOptions, Distance, Linkage


@dataclass(slots=True, kw_only=True)
class Model:
    """A source model as its config and headers describe it.

    Attributes:
        source: Where it comes from.
        settings: Its expert counts.
        skeleton: The model without weights.
        groups: Stored keys by decoder layer; ``None`` is everything outside the layers.
        unused: Stored keys that the model does not load.
        blocks: Its MoE blocks, one per sparse layer.
    """

    source: Source
    settings: MoESettings
    skeleton: Skeleton
    groups: Mapping[int | None, Group]
    unused: list[str]
    blocks: tuple[MoEBlock, ...]

    @property
    def parameters(self) -> int:
        """Parameters that the model loads, shared ones counted once."""
        shared = self.skeleton.model.all_tied_weights_keys.keys()
        return sum(tensor.numel() for name, tensor in self.skeleton.state.items() if name not in shared)

    def expert_parameters(self) -> int:
        """Parameters of all routed experts."""
        state = self.skeleton.state
        return sum(state[tensor.name].numel() for block in self.blocks for tensor in block.experts)


@dataclass(slots=True, kw_only=True)
class ConversionPlan:
    """Everything that a conversion will do, decided before it starts.

    Attributes:
        model: The source.
        options: The options in force.
        settings: Expert counts of the result.
        reduced: The result without weights.
        account: What becomes of every stored tensor.
        layout: Where every tensor of the result will lie.
        config: ``config.json`` of the result.
        sidecars: Files that are copied byte for byte.
        calibration: What the experts are observed on.
        batch_tokens: Tokens per micro-batch.
        output: Folder of the result.
        needs: Download, disk, memory, time.
        warnings: Where the user's wish was bent, or a second look is due.
    """

    model: Model
    options: ConvertOptions
    settings: MoESettings
    reduced: Skeleton
    account: Account
    layout: ShardLayout
    config: dict[str, Any]
    sidecars: list[str]
    calibration: CalibrationPlan
    batch_tokens: int
    output: Path
    needs: Needs
    warnings: list[str]

    @property
    def parameters_after(self) -> int:
        """Parameters of the result, shared ones counted once."""
        shared = self.reduced.model.all_tied_weights_keys.keys()
        return sum(tensor.numel() for name, tensor in self.reduced.state.items() if name not in shared)


def read_model(source: Source) -> Model:
    """Describes a source from its config and headers.

    Raises:
        SourceError: If files are missing or damaged, or contradict each other.
        UnsupportedModelError: If it is no model that can be converted.
    """
    built = build_config(source.config)
    _check_architecture(built.model_type, source)
    settings = config_json.read_settings(built)
    config_json.check_aliases(source.config, settings)
    dtype = _compute_dtype(source)
    skeleton = Skeleton(source.config, dtype)
    groups, unused = skeleton.group_keys(source.tensors)
    check_against_config(skeleton, groups, source.tensors)
    twice = _with_experts(source.config, built, settings, 2 * settings.experts)
    tensors = compare(skeleton.state, Skeleton(twice, dtype).state, experts=settings.experts)
    blocks = find_blocks(skeleton.layers_name, skeleton.layers, tensors, skeleton.state)
    if not blocks:
        raise UnsupportedModelError(f"{source.label} has no MoE layer, so there is nothing to merge.")
    model = Model(source=source, settings=settings, skeleton=skeleton, groups=groups, unused=unused, blocks=blocks)
    _check_expert_dtypes(model)
    return model


def make_plan(
    source: Source, options: ConvertOptions, *, flops_per_second: float | None = None, on_device: bool = False
) -> ConversionPlan:
    """Plans a conversion.

    Args:
        source: The checkpoint.
        options: What to do with it.
        flops_per_second: Measured speed of the device, for the estimate of time.
        on_device: Whether layers run on an accelerator.

    Raises:
        HcsmoeError: Every refusal of a conversion happens here.
    """
    _check_method(options)
    model = read_model(source)
    before = model.settings
    after = config_json.check_counts(
        before, experts=options.experts, experts_per_token=options.experts_per_token, label=source.label
    )
    keep_mtp = before.experts == after.experts
    account_of = (model.skeleton, source.tensors)
    is_quantized = model.skeleton.quantizer is not None
    plain = config_json.edit(source.config, model.skeleton.config, before, after, without_quantization=is_quantized)
    reduced = Skeleton(plain, model.skeleton.dtype)
    _check_reduced(model, reduced, after)
    account = take_account(account_of, model.groups, model.unused, reduced, model.blocks, keep_mtp=keep_mtp)
    config = config_json.edit(
        source.config,
        model.skeleton.config,
        before,
        after,
        without_mtp=bool(account.dropped),
        without_quantization=is_quantized,
    )
    layout = lay_out(account.outputs, max_shard_size=options.max_shard_size)
    calibration = plan_calibration(
        options.calibration,
        max_positions=getattr(model.skeleton.config, "max_position_embeddings", None),
        has_tokenizer=has_tokenizer(source.files()),
        label=source.label,
    )
    batch_tokens = options.batch_tokens or default_batch_tokens(on_device=on_device)
    output = options.output or Path(f"{source.name}-hcsmoe-{after.experts}e")
    plan = ConversionPlan(
        model=model,
        options=options,
        settings=after,
        reduced=reduced,
        account=account,
        layout=layout,
        config=config,
        sidecars=sidecar_files(source.files()),
        calibration=calibration,
        batch_tokens=batch_tokens,
        output=output,
        needs=_needs(model, reduced, layout, calibration, batch_tokens, after, flops_per_second, on_device),
        warnings=_warnings(model, after, account),
    )
    _check_room(plan)
    return plan


def _check_architecture(model_type: str, source: Source) -> None:
    architecture = ARCHITECTURES.get(model_type)
    supported = "see 'hcsmoe architectures' for what is supported"
    if architecture is None:
        settings = config_json.has_expert_count(source.config)
        kind = "is not supported" if settings else "is a dense model: its config names no experts to merge"
        raise UnsupportedModelError(f"{source.label} has model_type {model_type!r}, which {kind}.", hint=supported)
    if architecture.refusal:
        raise UnsupportedModelError(
            f"{source.label} has model_type {model_type!r}, which is refused: {architecture.refusal}.", hint=supported
        )


def _check_method(options: ConvertOptions) -> None:
    method = options.method
    if method.linkage is Linkage.WARD and method.distance is not Distance.EUCLIDEAN:
        raise PlanError(
            f"ward linkage measures squared errors, which the {method.distance} distance does not have.",
            hint="use --distance euclidean, or another --linkage",
        )


def _compute_dtype(source: Source) -> torch.dtype:
    """The dtype in which most of the weights are stored, or that they are dequantised to."""
    if quantization_method(source.config) is not None:
        return torch.bfloat16
    sizes: Counter[torch.dtype] = Counter()
    for tensor in source.tensors.values():
        if tensor.dtype.is_floating_point:
            sizes[tensor.dtype] += tensor.nbytes
    if not sizes:
        raise UnsupportedModelError(f"{source.label} stores no floating-point weights.")
    dtype = max(sizes, key=lambda dtype: sizes[dtype])
    if dtype.itemsize < 2:
        raise UnsupportedModelError(
            f"{source.label} stores {dtype} weights without a quantization_config that says how to read them.",
            hint="convert the unquantised checkpoint of the same model",
        )
    return dtype


def _check_expert_dtypes(model: Model) -> None:
    experts = {tensor.name for block in model.blocks for tensor in block.experts}
    for group in model.groups.values():
        for key, target in group.targets.items():
            dtype = model.source.tensors[key].dtype
            if target in experts - group.dequantized and dtype != model.skeleton.dtype:
                raise UnsupportedModelError(
                    f"expert tensor {key!r} is stored as {dtype}, most weights as {model.skeleton.dtype}: "
                    "experts of mixed precision cannot be merged without loss.",
                    hint="save the checkpoint in one dtype first",
                )


def _with_experts(config: Mapping[str, Any], built: Any, settings: MoESettings, experts: int) -> dict[str, Any]:
    after = MoESettings(
        experts=experts,
        experts_per_token=settings.experts_per_token,
        groups=settings.groups,
        groups_per_token=settings.groups_per_token,
    )
    return config_json.edit(config, built, settings, after, without_quantization=True)


def _check_reduced(model: Model, reduced: Skeleton, after: MoESettings) -> None:
    """Checks that the edited config describes exactly the tensors that the merge will produce."""
    sized = {tensor.name: tensor for block in model.blocks for tensor in (*block.experts, *block.router)}
    for name, tensor in model.skeleton.state.items():
        expected = list(tensor.shape)
        if name in sized:
            rows = after.experts * sized[name].rows_per_expert + sized[name].extra_rows
            expected[sized[name].dim] = rows
        found = list(reduced.state[name].shape) if name in reduced.state else "no tensor at all"
        if found != expected:
            raise PlanError(
                f"with {after.experts} experts and {after.experts_per_token} per token the model would need {found} for "
                f"{name}, the conversion makes {expected}.",
                hint="keep --experts-per-token as it is"
                if model.settings.experts_per_token != after.experts_per_token
                else "",
            )


def _warnings(model: Model, after: MoESettings, account: Account) -> list[str]:
    before, found = model.settings, []
    if before.experts == after.experts:
        found.append(f"{after.experts} experts are kept of {before.experts}: nothing will shrink.")
    if before.groups != after.groups:
        found.append(
            f"{after.experts} experts cannot be split into {before.groups} groups: group-limited routing is switched off "
            "(one group)."
        )
    if after.experts == after.experts_per_token < before.experts:
        found.append(f"every token will visit all {after.experts} experts: the layers become dense.")
    if account.dropped:
        found.append(f"{len(account.dropped)} tensors of multi-token prediction layers are dropped.")
    if model.skeleton.quantizer is not None:
        method = quantization_method(model.source.config)
        found.append(f"the source is quantised with {method}; the result is written in bfloat16.")
    return found


def _needs(
    model: Model,
    reduced: Skeleton,
    layout: ShardLayout,
    calibration: CalibrationPlan,
    batch_tokens: int,
    after: MoESettings,
    flops_per_second: float | None,
    on_device: bool,
) -> Needs:
    state, itemsize = model.skeleton.state, model.skeleton.dtype.itemsize
    sizes = {
        layer: sum(state[name].numel() for name in set(group.targets.values())) for layer, group in model.groups.items()
    }
    merged = max(sum(reduced.state[tensor.name].numel() for tensor in block.experts) for block in model.blocks)
    experts = model.expert_parameters()
    share = after.experts_per_token / after.experts
    dense = sum(size for layer, size in sizes.items() if layer is not None) - experts
    kept = experts * after.experts // model.settings.experts
    # Gate and up on every token; down and the merged block on the tokens that are routed.
    flops = 2 * (dense + experts * 2 // 3 + int(experts * share / 3) + int(kept * share))
    cost = LayerCost(
        layer_bytes=max(size for layer, size in sizes.items() if layer is not None) * itemsize,
        merged_bytes=merged * itemsize,
        rest_bytes=sizes.get(None, 0) * itemsize,
        flops_per_token=flops,
    )
    source = model.source
    return estimate(
        cost,
        tokens=calibration.tokens,
        batch_tokens=batch_tokens,
        token_bytes=itemsize,
        hidden_size=model.skeleton.config.get_text_config().hidden_size,
        download_bytes=source.download_bytes(),
        disk_bytes=layout.file_bytes,
        read_bytes=total_bytes(source.tensors.values()),
        on_device=on_device,
        flops_per_second=flops_per_second,
    )


def _check_room(plan: ConversionPlan) -> None:
    """Checks the output folder, the free disk and the memory limit.

    Raises:
        OutputError: If the result has no place.
        PlanError: If the estimated peak is above the limit.
    """
    output, overwrite = plan.output, plan.options.overwrite
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file.", hint="choose another folder with --output")
    source_path = plan.model.source.path
    if source_path is not None and output.resolve() == source_path.resolve():
        raise OutputError(f"{output} is the source itself.", hint="choose another folder with --output")
    if output.is_dir() and any(output.iterdir()):
        is_checkpoint = (output / "config.json").exists() or any(output.glob("*.safetensors*"))
        if not overwrite:
            raise OutputError(f"{output} is not empty.", hint="choose another folder with --output, or add --overwrite")
        if not is_checkpoint:
            raise OutputError(
                f"{output} holds files but no checkpoint, so --overwrite will not touch it.",
                hint="choose another folder with --output",
            )
    existing = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(existing).free, plan.needs.disk_bytes
    if free < needed:
        raise OutputError(
            f"the result needs {needed / 1e9:.1f} GB, but {existing} has {free / 1e9:.1f} GB free.",
            hint="choose another disk with --output",
        )
    limit = plan.options.max_memory_bytes
    if limit is not None and plan.needs.memory_bytes > limit:
        raise PlanError(
            f"the conversion needs about {plan.needs.memory_bytes / 1e9:.1f} GB of memory, more than the "
            f"{limit / 1e9:.1f} GB of --max-memory.",
            hint="use fewer --samples or a smaller --batch-tokens, or raise --max-memory",
        )
