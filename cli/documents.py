"""Plans and models as JSON values, with the keys of the report that a conversion writes."""

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hcsmoe_hub.checkpoint.source import Source
    from hcsmoe_hub.model.source_model import SourceModel
    from hcsmoe_hub.planning.conversion_plan import ConversionPlan


def _stacks(model: "SourceModel") -> dict[str, Any]:
    """Layers of the encoder and of the decoder, and how many of each have experts; nothing without an encoder."""
    if not model.skeleton.is_encoder_decoder:
        return {}
    depth, encoder = model.skeleton.depth, model.skeleton.encoder_depth
    in_encoder = sum(block.layer < encoder for block in model.blocks)
    return {
        "encoder": {"layers": encoder, "moe_layers": in_encoder},
        "decoder": {"layers": depth - encoder, "moe_layers": len(model.blocks) - in_encoder},
    }


def _source(source: "Source") -> dict[str, Any]:
    """Where a source comes from, and the format of most of its bytes."""
    from hcsmoe_hub.checkpoint.config_json import quantization_method
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


def _by_layer(counts: Mapping[int, int]) -> dict[str, int]:
    """Counts by layer, as JSON can hold them."""
    return {str(layer): count for layer, count in counts.items()}


def plan_document(plan: "ConversionPlan") -> dict[str, Any]:
    """A plan, as ``--dry-run --json`` prints it."""
    from hcsmoe_hub.planning.duration import measured_rates, plan_duration
    from hcsmoe_hub.planning.estimate import estimate_needs
    from hcsmoe_hub.planning.faster import long_warning
    from hcsmoe_hub.planning.sizes import active_parameter_counts, compression_record, parameter_counts, weight_bytes

    model, calibration = plan.model, plan.calibration
    rates = measured_rates(plan)
    duration, slow = plan_duration(plan, rates).as_dict(), long_warning(plan, rates)
    counts, compression = plan.experts_by_layer, compression_record(plan)
    return {
        "dry_run": True,
        "source": _source(model.source),
        "experts": plan.expert_counts,
        **({"experts_by_layer": _by_layer(counts)} if len(set(counts.values())) > 1 else {}),
        "is_final": plan.is_final,
        **({} if plan.target is None else {"target": plan.target.record()}),
        "parameters": parameter_counts(plan),
        "active_parameters": active_parameter_counts(plan),
        "weights_bytes": weight_bytes(plan),
        "quantises": _quantises(plan),
        "shards": {"before": len(model.source.shards), "after": len(plan.shards.files)},
        "needs": {**asdict(estimate_needs(plan)), "seconds": duration["seconds"]},
        "duration": duration,
        "method": plan.method,
        "like": None if plan.like is None else {**plan.like.record, "label": plan.like.label},
        **({} if compression is None else {"compression": compression}),
        "calibration": {
            "dataset": calibration.dataset,
            "sequences": calibration.sequences,
            "sequence_length": calibration.sequence_length,
            **({"source_length": calibration.source_length} if calibration.source_length else {}),
            "tokens": calibration.tokens,
            "seed": calibration.seed,
        },
        "statistics": _statistics(plan),
        "output": str(plan.output),
        "push_to": None if plan.options.push is None else plan.options.push.repo_id,
        "warnings": plan.warnings if slow is None else [*plan.warnings, slow],
        "dropped_tensors": plan.account.dropped,
    }


def _quantises(plan: "ConversionPlan") -> dict[str, Any] | None:
    """Formats that a result can be quantised to; ``None`` if it is quantised, or only transformers loads it."""
    from hcsmoe_hub.checkpoint import result_formats
    from hcsmoe_hub.options import Layout

    shape = result_formats.read_shape(plan.config, plan.width)
    if shape is None or plan.keeps_format or plan.recipe.layout not in (Layout.REDUCED, Layout.FULL):
        return None
    experts = plan.settings.experts
    sizes = result_formats.tensor_parallel_sizes(plan.config, plan.config["model_type"], experts)
    return {
        **result_formats.format_facts(shape),
        "tensor_parallel": {"divides": sizes, "whole_tiles": result_formats.whole_tiles(sizes, shape.width)},
        "expert_parallel": result_formats.expert_parallel_sizes(experts),
    }


def _statistics(plan: "ConversionPlan") -> dict[str, Any] | None:
    """The statistics file of a plan, and which calibration sequences run in spite of it: ``source`` or ``result``."""
    from hcsmoe_hub.planning.estimate import estimate_needs

    path, reused = plan.options.statistics, plan.statistics
    if path is None:
        return None
    size = estimate_needs(plan).statistics_bytes if reused is None else reused.bytes
    runs = "source" if plan.runs_source else ("result" if plan.recipe.propagates else None)
    return {"path": str(path), "reused": reused is not None, "bytes": size, "runs": runs}


def available(plan: "ConversionPlan") -> dict[str, Any]:
    """What this machine has free of what a plan needs: disk, memory, memory of the device."""
    from hcsmoe_hub.machine import accelerator
    from hcsmoe_hub.machine.device import resolve_device
    from hcsmoe_hub.machine.memory import available_memory

    disk, disk_bytes = _disk(plan.output)
    cache, cache_bytes = _disk(plan.model.source.cache or plan.output)
    device = resolve_device(plan.options.device)
    return {
        "disk": disk,
        "disk_bytes": disk_bytes,
        "cache": cache,
        "cache_bytes": cache_bytes,
        "memory_bytes": available_memory(),
        "device": str(device),
        "device_bytes": 0 if accelerator.is_host(device) else accelerator.free_bytes(device),
    }


def long_time(plan: "ConversionPlan") -> str | None:
    """What a conversion that takes more than an hour says about it at its start; ``None`` if it takes less."""
    from hcsmoe_hub.planning.duration import measured_rates
    from hcsmoe_hub.planning.faster import long_warning, may_take_long

    return long_warning(plan, measured_rates(plan)) if may_take_long(plan) else None


def is_short_of_room(plan: "ConversionPlan") -> bool:
    """Whether this machine lacks the disk or the memory to carry out a plan."""
    from hcsmoe_hub.planning.room import shortages

    return bool(shortages(plan))


def _disk(folder: Path) -> tuple[str, int]:
    """Where the disk of a folder is mounted, and what is free there."""
    from hcsmoe_hub.planning.disk_space import existing_part

    found = existing_part(folder.resolve())
    return str(next(path for path in (found, *found.parents) if path.is_mount())), shutil.disk_usage(found).free


def model_document(model: "SourceModel") -> dict[str, Any]:
    """A model, as ``inspect --json`` prints it."""
    from hcsmoe_hub.checkpoint.tensors import total_bytes
    from hcsmoe_hub.model.width import neurons_of
    from hcsmoe_hub.planning.sizes import active_parameters, projections, stored_experts

    source, settings, architecture = model.source, model.settings, model.architecture
    stored = {} if model.expert_map is None else {"stored_by_layer": _by_layer(stored_experts(model))}
    factors = {} if model.factors is None else {"factors": asdict(model.factors)}
    return {
        "source": _source(source),
        "architecture": type(model.skeleton.module).__name__,
        "router": architecture.router,
        "note": architecture.note or None,
        "experts": {
            "per_layer": settings.experts,
            "per_token": settings.experts_per_token,
            "width": neurons_of(model),
            "groups": settings.groups,
            **model.layer_counts,
            "layers": model.skeleton.depth,
            **_stacks(model),
            **stored,
            **factors,
        },
        "parameters": {
            "total": model.parameters,
            "experts": model.expert_parameters(),
            "active": active_parameters(model),
        },
        "weights_bytes": total_bytes(source.tensors.values()),
        "shards": len(source.shards),
        "projections": [asdict(projection) for projection in projections(model)],
    }
