"""Plans and models as JSON values, in the words of the report that a conversion writes."""

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcsmoe_hub.model.architectures import ARCHITECTURES
from hcsmoe_hub.options import Layout

if TYPE_CHECKING:
    from torch import Tensor

    from hcsmoe_hub.checkpoint.config_json import MoESettings
    from hcsmoe_hub.checkpoint.source import Source
    from hcsmoe_hub.model.source_model import SourceModel
    from hcsmoe_hub.planning.conversion_plan import ConversionPlan


def _source(source: "Source") -> dict[str, Any]:
    """Where a source comes from, and in which format most of its bytes are stored."""
    from hcsmoe_hub.checkpoint.tensors import DTYPE_NAMES
    from hcsmoe_hub.model.skeleton import quantization_method

    sizes: Counter[str] = Counter()
    for tensor in source.tensors.values():
        sizes[DTYPE_NAMES[tensor.dtype]] += tensor.nbytes
    name = {"repo_id": source.repo_id} if source.repo_id is not None else {"path": str(source.path)}
    return {
        **name,
        "revision": source.revision,
        "model_type": source.config["model_type"],
        "dtype": sizes.most_common(1)[0][0],
        "quantization": quantization_method(source.config),
    }


def _active(
    parameters: int, model: "SourceModel", state: Mapping[str, "Tensor"], stored: Mapping[int, int], per_token: int
) -> int:
    """Parameters that one token meets: all but those of the experts it does not visit.

    Args:
        parameters: Of the whole model.
        model: The source, for the names of its tensors.
        state: Tensors of the model in question.
        stored: Experts that each of its MoE layers holds.
        per_token: Experts that each token visits, where there are as many.
    """
    for block in model.blocks:
        experts = stored[block.layer]
        numbers = sum(state[tensor.name].numel() for tensor in block.experts)
        parameters -= numbers * max(0, experts - per_token) // experts
    return parameters


def _stored_experts(model: "SourceModel") -> dict[int, int]:
    """Experts that each MoE layer of a model holds; router rows may share them."""
    if model.expert_map is not None:
        return {layer: max(experts) + 1 for layer, experts in model.expert_map.items()}
    return {block.layer: model.settings.experts for block in model.blocks}


def _by_layer(counts: Mapping[int, int]) -> dict[str, int]:
    """Counts by layer, as JSON can hold them."""
    return {str(layer): count for layer, count in counts.items()}


def _model_active(model: "SourceModel") -> int:
    """Parameters of a model that one token meets."""
    return _active(
        model.parameters, model, model.skeleton.state, _stored_experts(model), model.settings.experts_per_token
    )


def plan_document(plan: "ConversionPlan") -> dict[str, Any]:
    """A plan, as ``--dry-run --json`` prints it."""
    from hcsmoe_hub.checkpoint.tensors import total_bytes
    from hcsmoe_hub.machine.device import measure_flops, resolve_device
    from hcsmoe_hub.planning.estimate import estimate_needs

    model, calibration = plan.model, plan.calibration
    speed = measure_flops(resolve_device(plan.options.device), model.skeleton.dtype)
    before, after, counts = model.settings, plan.settings, plan.experts_by_layer
    # In the full layout the members of a cluster are copies of its expert.
    stored = _stored_experts(model) if plan.recipe.layout is Layout.FULL else counts
    statistics = plan.options.statistics
    return {
        "dry_run": True,
        "source": _source(model.source),
        "experts": {
            "before": before.experts,
            "after": plan.options.experts,
            "per_token_before": before.experts_per_token,
            "per_token_after": after.experts_per_token,
            "moe_layers": len(model.blocks),
        },
        **({"experts_by_layer": _by_layer(counts)} if len(set(counts.values())) > 1 else {}),
        "is_final": plan.is_final,
        "parameters": {"before": model.parameters, "after": plan.parameters_after},
        "active_parameters": {
            "before": _model_active(model),
            "after": _active(plan.parameters_after, model, plan.state, stored, after.experts_per_token),
        },
        "weights_bytes": {
            "before": total_bytes(model.source.tensors.values()),
            "after": total_bytes(plan.shards.tensors.values()),
        },
        "shards": {"before": len(model.source.shards), "after": len(plan.shards.files)},
        "needs": asdict(estimate_needs(plan, flops_per_second=speed)),
        "method": plan.recipe.as_dict(),
        "calibration": {
            "dataset": calibration.dataset,
            "sequences": calibration.sequences,
            "sequence_length": calibration.sequence_length,
            "tokens": calibration.tokens,
            "seed": calibration.seed,
        },
        "statistics": None if statistics is None else {"path": str(statistics), "reused": plan.statistics is not None},
        "output": str(plan.output),
        "push_to": None if plan.options.push is None else plan.options.push.repo_id,
        "warnings": plan.warnings,
        "dropped_tensors": plan.account.dropped,
    }


def available(plan: "ConversionPlan") -> dict[str, Any]:
    """What this machine has of what a plan needs: disk, memory, memory of the device."""
    import psutil
    import torch

    from hcsmoe_hub.machine.device import resolve_device

    disk, disk_bytes = _disk(plan.output)
    cache, cache_bytes = _disk(plan.model.source.cache or plan.output)
    device = resolve_device(plan.options.device)
    return {
        "disk": disk,
        "disk_bytes": disk_bytes,
        "cache": cache,
        "cache_bytes": cache_bytes,
        "memory_bytes": psutil.virtual_memory().available,
        "device": str(device),
        "device_bytes": 0 if device.type == "cpu" else torch.cuda.mem_get_info(device)[0],
    }


def _disk(folder: Path) -> tuple[str, int]:
    """Where the disk of a folder is mounted, and what is free there."""
    from hcsmoe_hub.planning.disk_space import existing_part

    found = existing_part(folder.resolve())
    return str(next(path for path in (found, *found.parents) if path.is_mount())), shutil.disk_usage(found).free


def model_document(model: "SourceModel") -> dict[str, Any]:
    """A model, as ``inspect --json`` prints it."""
    from hcsmoe_hub.checkpoint.tensors import total_bytes

    source, settings, config = model.source, model.settings, model.skeleton.config
    architecture = ARCHITECTURES[config.model_type]
    weights_bytes, experts = total_bytes(source.tensors.values()), model.expert_parameters()
    is_mapped = model.expert_map is not None
    return {
        "source": _source(source),
        "architecture": type(model.skeleton.module).__name__,
        "router": architecture.router,
        "note": architecture.note or None,
        "experts": {
            "per_layer": settings.experts,
            "per_token": settings.experts_per_token,
            "groups": settings.groups,
            "moe_layers": len(model.blocks),
            "layers": len(model.skeleton.layers),
            **({"stored_by_layer": _by_layer(_stored_experts(model))} if is_mapped else {}),
        },
        "parameters": {
            "total": model.parameters,
            "experts": experts,
            "active": _model_active(model),
        },
        "weights_bytes": weights_bytes,
        "shards": len(source.shards),
        # A result whose router rows share experts is not converted again.
        "projections": []
        if is_mapped
        else [_projection(model, kept, weights_bytes) for kept in _worth_trying(settings)],
    }


def _worth_trying(settings: "MoESettings") -> list[int]:
    """Three quarters and half of the experts, where that is fewer than now and enough for a token."""
    counts = (settings.experts * 3 // 4, settings.experts // 2)
    return [kept for kept in dict.fromkeys(counts) if settings.experts_per_token <= kept < settings.experts]


def _projection(model: "SourceModel", kept: int, weights_bytes: int) -> dict[str, int]:
    """What would remain with ``kept`` experts per layer, but for the few rows of the routers."""
    experts, itemsize = model.settings.experts, model.skeleton.dtype.itemsize
    gone = model.expert_parameters() * (experts - kept) // experts
    # A quantised source is written back in the dtype it is computed in.
    is_quantized = model.skeleton.quantizer is not None
    remaining_bytes = (model.parameters - gone) * itemsize if is_quantized else weights_bytes - gone * itemsize
    return {"experts": kept, "parameters": model.parameters - gone, "weights_bytes": remaining_bytes}
