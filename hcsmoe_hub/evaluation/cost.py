"""What a checkpoint and its base cost to run: counted from their headers, and measured on this machine."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.evaluation.cost_flops import CannotCountError, count_flops
from hcsmoe_hub.evaluation.cost_memory import Fresh
from hcsmoe_hub.evaluation.cost_options import SWITCHED_OFF, CostOptions, Engine
from hcsmoe_hub.evaluation.cost_parameters import active_parameters, count_parameters
from hcsmoe_hub.evaluation.cost_timing import time_models
from hcsmoe_hub.evaluation.scorers import MEMORY_SHARE, free_bytes
from hcsmoe_hub.events import Listener
from hcsmoe_hub.machine import accelerator
from hcsmoe_hub.machine.device import compute_dtype
from hcsmoe_hub.machine.processor import processor_name
from hcsmoe_hub.machine.units import format_bytes
from hcsmoe_hub.machine.versions import version_of
from hcsmoe_hub.model.transformers_seam import implementations

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRun:
    """How the cost of checkpoints is found.

    Attributes:
        options: What to count and measure.
        device: Where models run.
        token: Hub token; ``None`` uses the stored login.
        cache_dir: Hub cache; ``None`` uses the default one.
        emit: Called with downloads and warnings.
        advance: Called after every step of ``steps``.
    """

    options: CostOptions
    device: torch.device
    token: str | None
    cache_dir: Path | None
    emit: Listener
    advance: Callable[[], None]


def cost_steps(options: CostOptions, models: int) -> int:
    """Number of progress steps: one to count each model, one per measured run, and one for its memory."""
    runs = len(options.batch_sizes) * (options.repetitions + 1) if options.engine is Engine.TORCH else 1
    return models * (1 + (runs + 1 if options.timing else 0))


def measure_cost(checkpoints: Sequence[Checkpoint], run: CostRun) -> Figures:
    """Counts and measures checkpoints.

    Args:
        checkpoints: The model, and its base if there is one.
        run: How.

    Returns:
        ``settings``, ``versions``, ``seconds``, and the figures of ``model`` and ``base``, each with what was counted
        and measured and with the reason for everything that was not; ``measures.Cost`` describes them.
    """
    start, options = time.perf_counter(), run.options
    dtype = _dtype(checkpoints[0], run)
    found = []
    for checkpoint in checkpoints:
        found.append(_counted(checkpoint, options.prompt_length, dtype))
        run.advance()
    order: str | None = None
    computed_by: dict[str, str] = {}
    if options.timing:
        fresh = Fresh(
            options=options,
            device=run.device,
            dtype=dtype,
            token=run.token,
            cache_dir=run.cache_dir,
            emit=run.emit,
        )
        if options.engine is Engine.VLLM:
            order = _time_in_vllm(checkpoints, found, fresh, run)
        else:
            order, computed_by = _time_in_torch(checkpoints, found, run, dtype)
            _measure_memory(checkpoints, found, fresh, run)
    else:
        for figures in found:
            figures |= {"throughput": None, "throughput_problem": SWITCHED_OFF}
            figures |= {"peak_memory": None, "peak_memory_problem": SWITCHED_OFF}
    settings = {**asdict(options), "batch_sizes": list(options.batch_sizes), "order": order, **computed_by}
    settings |= {"dtype": str(dtype).removeprefix("torch."), "device": run.device.type, "machine": machine(run.device)}
    versions = {"vllm": version_of("vllm")} if options.timing and options.engine is Engine.VLLM else {}
    return {
        "settings": settings,
        "versions": versions,
        "seconds": round(time.perf_counter() - start, 3),
        "model": found[0],
        "base": found[1] if len(found) > 1 else None,
    }


def machine(device: torch.device) -> str:
    """What figures of time depend on: the model of the accelerator, or of the processor with the threads in use."""
    if not accelerator.is_host(device):
        return accelerator.name(device)
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'' if threads == 1 else 's'}"


def _dtype(checkpoint: Checkpoint, run: CostRun) -> torch.dtype:
    """The dtype that models run in: that of most weights, or one of 16 bits for another that the device is fast at."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in checkpoint.placement.tensors.values():
        counts[tensor.dtype] += tensor.nbytes
    stored = max((dtype for dtype in counts if dtype.is_floating_point), key=lambda dtype: counts[dtype])
    if run.options.engine is Engine.VLLM:
        return stored
    # Few processors multiply float16.
    is_slow = stored == torch.bfloat16 or (stored == torch.float16 and accelerator.is_host(run.device))
    return compute_dtype(run.device) if is_slow else stored


def _counted(checkpoint: Checkpoint, context: int, dtype: torch.dtype) -> Figures:
    """What follows from config and headers."""
    skeleton = checkpoint.skeleton(dtype)
    figures: Figures = {**count_parameters(checkpoint, skeleton)}
    try:
        flops = count_flops(skeleton, context)
    except CannotCountError as error:
        nothing = dict.fromkeys(("active_parameters", "prefill_flops", "decode_flops", "is_attention_masked"))
        return {**figures, **nothing, "flops_problem": str(error)}
    return {
        **figures,
        "active_parameters": active_parameters(checkpoint.skeleton(dtype), flops.active_experts),
        "prefill_flops": round(flops.prefill),
        "decode_flops": flops.decode,
        "is_attention_masked": flops.is_masked,
        "flops_problem": None,
    }


def _problem(needed: int, device: torch.device) -> str | None:
    """Why models do not run in memory; ``None`` if they fit."""
    free = free_bytes(device)
    if needed <= MEMORY_SHARE * free:
        return None
    return f"its weights take {format_bytes(needed)}, too much for the {format_bytes(free)} that are free"


def _time_in_torch(
    checkpoints: Sequence[Checkpoint], found: Sequence[Figures], run: CostRun, dtype: torch.dtype
) -> tuple[str | None, dict[str, str]]:
    """Adds the throughput of every model that fits into memory: in turns if they fit together, otherwise one by one.

    Returns:
        The order, and what computed attention and experts.
    """
    options, vocab_size = run.options, min(checkpoint.vocab_size for checkpoint in checkpoints)
    numbers = list(range(len(checkpoints)))
    together = _problem(sum(figures["memory_bytes"] for figures in found), run.device) is None
    computed_by: dict[str, str] = {}
    for group in [numbers] if together else [[number] for number in numbers]:
        problem = _problem(sum(found[number]["memory_bytes"] for number in group), run.device)
        if problem is not None:
            for number in group:
                found[number].update(throughput=None, throughput_problem=problem)
                for _ in range(cost_steps(options, 1) - 2):
                    run.advance()
            continue
        skeletons = [checkpoints[number].filled(run.device, run.emit, dtype) for number in group]
        computed_by = implementations(skeletons[0].module)
        timed = time_models(skeletons, options, run.device, vocab_size=vocab_size, advance=run.advance)
        for number, batches in zip(group, timed, strict=True):
            found[number].update(throughput=batches, throughput_problem=None)
        del skeletons
        accelerator.release_unused(run.device)
    return ("in turns" if together else "one after another") if len(numbers) > 1 else None, computed_by


def _measure_memory(checkpoints: Sequence[Checkpoint], found: Sequence[Figures], fresh: Fresh, run: CostRun) -> None:
    """Adds the peak memory of every model that fits."""
    for checkpoint, figures in zip(checkpoints, found, strict=True):
        problem = _problem(figures["memory_bytes"], run.device)
        answer = fresh.peak(checkpoint) if problem is None else {"problem": problem}
        figures |= {"peak_memory": answer.get("peak"), "peak_memory_problem": answer.get("problem")}
        run.advance()


def _time_in_vllm(
    checkpoints: Sequence[Checkpoint], found: Sequence[Figures], fresh: Fresh, run: CostRun
) -> str | None:
    """Adds the throughput in vLLM, of which only one can hold the memory of a device at a time."""
    for checkpoint, figures in zip(checkpoints, found, strict=True):
        answer = fresh.throughput(checkpoint)
        figures |= {"throughput": answer.get("throughput"), "throughput_problem": answer.get("problem")}
        run.advance()
        figures |= {"peak_memory": None, "peak_memory_problem": "vLLM reserves memory in advance, whatever it needs"}
        run.advance()
    return "one after another" if len(checkpoints) > 1 else None
