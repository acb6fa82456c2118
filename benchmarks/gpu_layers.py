"""Layers as wide as those of Mixtral-8x7B and Qwen3-30B-A3B: seconds by part, peaks against the plan, a profile."""

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from gpu_checkpoints import Shape, first_layer, token_ids, write_model
from gpu_correctness import convert_with
from gpu_run import Run
from gpu_stopwatch import FORWARD, LOAD, READ, WRITE, Stopwatch

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, plan
from hcsmoe_hub.convert import ConversionReport
from hcsmoe_hub.events import Event, Stage, StageAdvanced
from hcsmoe_hub.machine import accelerator
from hcsmoe_hub.options import Preset, Refit
from hcsmoe_hub.planning.duration import measured_rates, plan_duration
from hcsmoe_hub.planning.estimate import estimate_needs

MIXTRAL = Shape(kind="mixtral", hidden=4096, neurons=14336, experts=8, top_k=2)
QWEN = Shape(kind="qwen3_moe", hidden=2048, neurons=768, experts=128, top_k=8, key_heads=4)
# The same for a dry run.
SMALL = {"hidden": 64, "heads": 4, "key_heads": 2, "head": 16, "vocabulary": 512}
LENGTH, ROWS = 2048, 32
TABLE_ROWS = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One conversion.

    Attributes:
        method: Of the conversion.
        seconds: About what it takes on an H100.
        rows: Calibration sequences of 2048 tokens.
        one_layer: Whether only the first of two layers is converted.
        batch_tokens: Tokens per micro-batch; ``None`` for the default.
        is_profiled: Whether torch's profiler runs instead of the stopwatch.
    """

    method: MethodOptions
    seconds: float
    rows: int = ROWS
    one_layer: bool = False
    batch_tokens: int | None = None
    is_profiled: bool = False


_REAP, _HC_SMOE, _DEFAULT = (MethodOptions(preset=each) for each in (Preset.REAP, Preset.HC_SMOE, Preset.HC_REFIT))
CASES = {
    "reap 65k": Case(method=_REAP, seconds=30),
    "hc-smoe 65k": Case(method=_HC_SMOE, seconds=25),
    "hc-smoe 65k, batches of 32k": Case(method=_HC_SMOE, seconds=25, batch_tokens=32768),
    "hc-smoe 65k, profiled": Case(method=_HC_SMOE, seconds=40, is_profiled=True),
    "hc-refit 131k, one layer": Case(method=_DEFAULT, seconds=50, rows=2 * ROWS, one_layer=True),
    "hc-refit 131k, one layer, profiled": Case(
        method=_DEFAULT, seconds=60, rows=2 * ROWS, one_layer=True, is_profiled=True
    ),
    "reap with refit down 131k, one layer": Case(
        method=replace(_REAP, refit=Refit.DOWN), seconds=50, rows=2 * ROWS, one_layer=True
    ),
}

IN_DRY_RUN = ("reap 65k", "hc-smoe 65k, batches of 32k", "hc-refit 131k, one layer", "hc-smoe 65k, profiled")


def check_mixtral(run: Run) -> None:
    """Layers of Mixtral-8x7B."""
    _check(run, "mixtral", replace(MIXTRAL, **SMALL, neurons=96) if run.is_tiny else MIXTRAL)


def check_qwen(run: Run) -> None:
    """Layers of Qwen3-30B-A3B."""
    small = replace(QWEN, **SMALL, neurons=48, experts=16, top_k=4)
    _check(run, "qwen3", small if run.is_tiny else QWEN)


def _check(run: Run, name: str, shape: Shape) -> None:
    source = write_model(run, name, shape)
    single = first_layer(source)
    for label, case in CASES.items():
        if run.is_tiny and (label not in IN_DRY_RUN or (case.is_profiled and not shape.is_mixtral)):
            continue
        place = single if case.one_layer else source
        full = f"{name} {label}"
        run.part(full, case.seconds, lambda place=place, full=full, case=case: _perform(run, full, place, shape, case))


def _perform(run: Run, name: str, source: Path, shape: Shape, case: Case) -> None:
    rows, length = (8, 64) if run.is_tiny else (case.rows, LENGTH)
    ids, stamps = token_ids(run, rows, length, shape.vocabulary), list[float]()
    output, experts = run.scratch / "result", shape.experts // 2
    more = {} if case.batch_tokens is None else {"batch_tokens": case.batch_tokens}
    wanted = _planned(run, source, case.method, ids, experts, **more)

    def listener(event: Event) -> None:
        if isinstance(event, StageAdvanced) and event.stage is Stage.CONVERT:
            run.wait()
            stamps.append(time.perf_counter())

    accelerator.reset_peak(run.device)
    begin = time.perf_counter()
    with Stopwatch(run) if not case.is_profiled else nullcontext() as watch, _profiler(run, case) as profiler:
        report = convert_with(
            source,
            case.method,
            device=str(run.device),
            ids=ids,
            output=output,
            experts=experts,
            listener=listener,
            **more,
        )
        run.wait()
    total = time.perf_counter() - begin
    row: dict[str, Any] = {
        "seconds": total,
        "between_layers": [round(after - before, 3) for before, after in pairwise(stamps)],
        "planned": wanted,
        **_peaks(run, report, wanted),
    }
    if watch is not None:
        row["parts"] = {label: [round(seconds, 3), watch.calls[label]] for label, seconds in watch.seconds.items()}
        row["ratios"] = _ratios(run, wanted, watch.seconds, source, output)
    if profiler is not None:
        row |= _profile(run, name, profiler, total)
    run.keep_row("layers", name, row)
    run.say(f"  {name}: {total:.1f} s, planned {wanted['duration']['seconds']:.1f} s")
    for key in ("between_layers", "peaks", "parts", "ratios", "busy_seconds"):
        if key in row:
            run.say(f"    {key}: {row[key]}")


def _planned(
    run: Run, source: Path, method: MethodOptions, ids: Path, experts: int, **more: Any
) -> dict[str, dict[str, Any]]:
    """What the planner expects."""
    options = ConvertOptions(
        experts=experts,
        method=method,
        calibration=CalibrationOptions(dataset=str(ids)),
        device=str(run.device),
        output=run.scratch / "planned",
        **more,
    )
    made = plan(source, options)
    return {"needs": asdict(estimate_needs(made)), "duration": plan_duration(made, measured_rates(made)).as_dict()}


def _peaks(run: Run, report: ConversionReport, wanted: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Peaks of memory in bytes, and their ratio to those of the plan."""
    peaks = {"process": [report.peak_memory_bytes["process"], wanted["needs"]["memory_bytes"]]}
    if not accelerator.is_host(run.device):
        peaks["device"] = [accelerator.peak_bytes(run.device), wanted["needs"]["device_bytes"]]
    return {"peaks": {place: [*pair, round(pair[0] / pair[1], 3)] for place, pair in peaks.items()}}


def _ratios(
    run: Run, wanted: dict[str, dict[str, Any]], seconds: dict[str, float], source: Path, output: Path
) -> dict[str, float]:
    """What the machine's own ceilings would allow over what was measured; 1 is as fast as the machine can be."""
    ceilings = run.found.get("ceilings")
    if ceilings is None or ceilings["disk"] is None:
        return {}
    rates, disk = ceilings["rates"], ceilings["disk"]
    size, wrote = (sum(file.stat().st_size for file in place.glob("*.safetensors")) for place in (source, output))
    found = {
        "forward at the rate of products": (wanted["duration"]["products"], FORWARD),
        "reading at the rate of the disk": (size / disk["read"], READ),
        "loading at the rate of copies": (size / rates["to_device"], LOAD),
        "writing at the rate of the disk": (wrote / disk["write"], WRITE),
    }
    return {name: round(least / seconds[part], 3) for name, (least, part) in found.items() if seconds.get(part)}


def _profiler(run: Run, case: Case) -> Any:
    if not case.is_profiled:
        return nullcontext()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not accelerator.is_host(run.device):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


def _profile(run: Run, name: str, profiler: Any, total: float) -> dict[str, float]:
    """Writes the tables of a profile; returns for how long the device was busy."""
    averages = profiler.key_averages()
    is_host = accelerator.is_host(run.device)
    orders = ["self_cpu_time_total"] if is_host else ["self_device_time_total", "self_cpu_time_total"]
    tables = [averages.table(sort_by=order, row_limit=TABLE_ROWS, max_name_column_width=60) for order in orders]
    file = run.out / f"profile-{name.replace(' ', '-').replace(',', '')}.txt"
    file.write_text("\n".join(tables))
    if is_host:
        return {}
    kernels = torch.autograd.DeviceType.CUDA
    busy = sum(row.self_device_time_total for row in averages if row.device_type == kernels) / 1e6
    return {"busy_seconds": busy, "busy_share": busy / total}
