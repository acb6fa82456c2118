"""Plans and models as JSON values, in the words of the report that a conversion writes."""

import shutil
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hcsmoe_hub.moe.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from hcsmoe_hub.checkpoint.config_json import MoESettings
    from hcsmoe_hub.checkpoint.source import Source
    from hcsmoe_hub.model import Model
    from hcsmoe_hub.plan import ConversionPlan


def _source(source: "Source") -> dict[str, Any]:
    """Where a source comes from, and in which format most of its bytes are stored."""
    from hcsmoe_hub.checkpoint.skeleton import quantization_method
    from hcsmoe_hub.checkpoint.tensors import DTYPE_NAMES

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


def _active(parameters: int, expert_parameters: int, settings: "MoESettings") -> int:
    """Parameters that one token meets: all but those of the experts it does not visit."""
    return parameters - expert_parameters * (settings.experts - settings.experts_per_token) // settings.experts


def plan_document(plan: "ConversionPlan") -> dict[str, Any]:
    """A plan, as ``--dry-run --json`` prints it."""
    from hcsmoe_hub.checkpoint.tensors import total_bytes
    from hcsmoe_hub.device import measure_flops, resolve_device

    model, calibration = plan.model, plan.calibration
    speed = measure_flops(resolve_device(plan.options.device), model.skeleton.dtype)
    before, after, experts = model.settings, plan.settings, model.expert_parameters()
    return {
        "dry_run": True,
        "source": _source(model.source),
        "experts": {
            "before": before.experts,
            "after": after.experts,
            "per_token_before": before.experts_per_token,
            "per_token_after": after.experts_per_token,
            "moe_layers": len(model.blocks),
        },
        "parameters": {"before": model.parameters, "after": plan.parameters_after},
        "active_parameters": {
            "before": _active(model.parameters, experts, before),
            "after": _active(plan.parameters_after, experts * after.experts // before.experts, after),
        },
        "weights_bytes": {
            "before": total_bytes(model.source.tensors.values()),
            "after": total_bytes(plan.layout.tensors.values()),
        },
        "shards": {"before": len(model.source.shards), "after": len(plan.layout.shards)},
        "needs": asdict(plan.needs(flops_per_second=speed)),
        "method": {key: str(value) for key, value in asdict(plan.options.method).items()},
        "calibration": {
            "dataset": calibration.dataset,
            "sequences": calibration.sequences,
            "sequence_length": calibration.sequence_length,
            "tokens": calibration.tokens,
            "seed": calibration.seed,
        },
        "output": str(plan.output),
        "warnings": plan.warnings,
        "dropped_tensors": plan.account.dropped,
    }


def available(plan: "ConversionPlan") -> dict[str, Any]:
    """What this machine has of what a plan needs: disk, memory, memory of the device."""
    import psutil
    import torch

    from hcsmoe_hub.device import resolve_device

    output = plan.output.resolve()
    folder = next(path for path in (output, *output.parents) if path.exists())
    disk = next(path for path in (folder, *folder.parents) if path.is_mount())
    device = resolve_device(plan.options.device)
    return {
        "disk": str(disk),
        "disk_bytes": shutil.disk_usage(folder).free,
        "memory_bytes": psutil.virtual_memory().available,
        "device": str(device),
        "device_bytes": 0 if device.type == "cpu" else torch.cuda.mem_get_info(device)[0],
    }


def model_document(model: "Model") -> dict[str, Any]:
    """A model, as ``inspect --json`` prints it."""
    from hcsmoe_hub.checkpoint.tensors import total_bytes

    source, settings, config = model.source, model.settings, model.skeleton.config
    architecture = ARCHITECTURES[config.model_type]
    weights_bytes, experts = total_bytes(source.tensors.values()), model.expert_parameters()
    return {
        "source": _source(source),
        "architecture": type(model.skeleton.model).__name__,
        "router": architecture.router,
        "note": architecture.note or None,
        "experts": {
            "per_layer": settings.experts,
            "per_token": settings.experts_per_token,
            "groups": settings.groups,
            "moe_layers": len(model.blocks),
            "layers": len(model.skeleton.layers),
        },
        "parameters": {
            "total": model.parameters,
            "experts": experts,
            "active": _active(model.parameters, experts, settings),
        },
        "weights_bytes": weights_bytes,
        "shards": len(source.shards),
        "projections": [_projection(model, kept, weights_bytes) for kept in _worth_trying(settings)],
    }


def _worth_trying(settings: "MoESettings") -> list[int]:
    """Three quarters and half of the experts, where that is fewer than now and enough for a token."""
    counts = (settings.experts * 3 // 4, settings.experts // 2)
    return [kept for kept in dict.fromkeys(counts) if settings.experts_per_token <= kept < settings.experts]


def _projection(model: "Model", kept: int, weights_bytes: int) -> dict[str, int]:
    """What would remain with ``kept`` experts per layer, but for the few rows of the routers."""
    experts, itemsize = model.settings.experts, model.skeleton.dtype.itemsize
    gone = model.expert_parameters() * (experts - kept) // experts
    # A quantised source is written back in the dtype it is computed in.
    is_quantized = model.skeleton.quantizer is not None
    remaining_bytes = (model.parameters - gone) * itemsize if is_quantized else weights_bytes - gone * itemsize
    return {"experts": kept, "parameters": model.parameters - gone, "weights_bytes": remaining_bytes}
