"""Converts one checkpoint in this process, and prints what that took as JSON: what ``speed.py`` and others start.

Run: python benchmarks/one_conversion.py SOURCE OUTPUT --experts K --calibration FILE [--preset NAME]
         [--no-checkpoint]

The libraries are prepared as the command ``hcsmoe`` prepares them. Start-up is everything before the first layer:
imports, the plan, and the calibration set.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from hcsmoe_hub.cli.libraries import collector_paused, prepare_libraries
from hcsmoe_hub.convert import execute, plan
from hcsmoe_hub.events import Event, Stage, StageFinished, StageStarted
from hcsmoe_hub.options import CalibrationOptions, ConvertOptions, MethodOptions, Preset


def used(started: float) -> dict[str, float]:
    """Seconds of this process since it was started: ``wall``, ``user`` and ``system``."""
    now = resource.getrusage(resource.RUSAGE_SELF)
    return {"wall": time.time() - started, "user": now.ru_utime, "system": now.ru_stime}


def peak_bytes() -> int:
    """Peak resident set of this process; on Linux without that of the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def moved_bytes() -> dict[str, int]:
    """Bytes that this process has read and written through system calls; empty where the system does not count them."""
    counts = Path("/proc/self/io")
    if not counts.exists():
        return {}
    found = dict(line.split(": ") for line in counts.read_text().splitlines())
    return {"read_bytes": int(found["rchar"]), "written_bytes": int(found["wchar"])}


def convert(source: str, options: ConvertOptions, started: float) -> dict[str, Any]:
    """Converts a checkpoint in a process that was started at a time, and returns what it took."""
    with collector_paused():
        prepare_libraries()
        planned = plan(source, options)
    from hcsmoe_hub.planning.estimate import estimate_needs

    marks: dict[str, dict[str, float]] = {}
    before: dict[str, int] = {}

    def listener(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage is Stage.CONVERT:
            marks["start_up"] = used(started)
            before.update(moved_bytes())
        if isinstance(event, StageFinished) and event.stage is Stage.CONVERT:
            marks["layers"] = used(started)

    execute(planned, listener=listener)
    return {
        **marks,
        "whole": used(started),
        "peak_bytes": peak_bytes(),
        **{name: count - before[name] for name, count in moved_bytes().items()},
        "flops": estimate_needs(planned).flops,
        "compute_dtype": str(planned.model.skeleton.dtype).removeprefix("torch."),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("output", type=Path)
    parser.add_argument("--experts", type=int, required=True)
    parser.add_argument("--calibration", required=True, help="token ids as .npy")
    parser.add_argument("--no-checkpoint", action="store_true")
    parser.add_argument("--preset", help="as of hcsmoe; the default recipe without it")
    parser.add_argument("--started", type=float, default=time.time(), help="time at which this process was started")
    chosen = parser.parse_args()
    options = ConvertOptions(
        experts=chosen.experts,
        method=MethodOptions(preset=None if chosen.preset is None else Preset(chosen.preset)),
        calibration=CalibrationOptions(dataset=chosen.calibration),
        device="cpu",
        output=chosen.output,
        overwrite=True,
        checkpoint=not chosen.no_checkpoint,
    )
    json.dump(convert(chosen.source, options, chosen.started), sys.stdout)


if __name__ == "__main__":
    main()
