"""What the device itself can do: products by dtype, copies, factorisations, disk. Everything else is a ratio to it."""

import time
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from gpu_run import Run

from hcsmoe_hub.machine import accelerator
from hcsmoe_hub.machine.rates import copy_rate, measure_device, measure_disk, product_rate
from hcsmoe_hub.machine.versions import installed_versions


def measure_ceilings(run: Run) -> None:
    """Measures all of them and keeps them as ``ceilings``."""
    device = run.device
    found: dict[str, Any] = {
        "versions": installed_versions(),
        "device": accelerator.name(device),
        "threads": torch.get_num_threads(),
        "rates": asdict(measure_device(device)),
    }
    disk = measure_disk(run.scratch)
    found["disk"] = None if disk is None else asdict(disk)
    run.keep("ceilings", found)
    if not accelerator.is_host(device):
        found["memory_bytes"] = accelerator.total_bytes(device)
        found["pageable_to_device"] = copy_rate(device, to_host=False, pinned=False)
        found["pageable_to_host"] = copy_rate(device, to_host=True, pinned=False)
        rows = (64, 512, 4096)
        found["bfloat16_by_rows"] = {count: product_rate(device, torch.bfloat16, rows=count) for count in rows}
    found["factorisations"] = _factorisations(run)
    run.keep("ceilings", found)
    for name, value in found.items():
        run.say(f"  {name:24} {value}")


def _factorisations(run: Run) -> dict[str, float]:
    """Seconds of a Cholesky factorisation in float64 of the neurons of Mixtral, and of solving for its hidden size."""
    neurons, hidden = (128, 64) if run.is_tiny else (14336, 4096)
    gram = torch.randn(neurons, 64, device=run.device).double()
    gram = gram @ gram.T
    gram.diagonal().add_(float(neurons))
    wanted = torch.randn(neurons, hidden, device=run.device).double()
    factor = torch.linalg.cholesky(gram)
    return {
        "cholesky": _clock(run, lambda: torch.linalg.cholesky(gram)),
        "solve": _clock(run, lambda: torch.cholesky_solve(wanted, factor)),
    }


def _clock(run: Run, work: Any) -> float:
    work()
    times = []
    for _ in range(3):
        run.wait()
        begin = time.perf_counter()
        work()
        run.wait()
        times.append(time.perf_counter() - begin)
    return median(times)
