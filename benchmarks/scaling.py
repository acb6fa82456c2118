"""Measures what time and memory of a conversion grow with: layers, experts, tokens, and ranks.

Run: python benchmarks/scaling.py [--axes layers experts tokens ranks] [--preset reap] [--json FILE]

The models are small Mixtrals with random weights; every conversion runs in a fresh process with one thread and keeps
half of the experts. One axis grows while the others stay at the base: 8 layers, 8 experts, 2,048 tokens (131,072 where
ranks share them), one rank.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fresh_process import cpu_seconds, machine, run
from synthetic import IDS_FILE, Shape, write_checkpoint

LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class Case:
    """One conversion: its model, its calibration set and the processes that share it."""

    layers: int = 8
    experts: int = 8
    tokens: int = 2048
    ranks: int = 1

    def shape(self) -> Shape:
        """The model; experts of many-expert models are narrower, so that a layer keeps its size."""
        width = max(32, 1024 * 8 // self.experts)
        return Shape(
            family="mixtral",
            hidden=256,
            width=width,
            layers=self.layers,
            experts=self.experts,
            active=2,
            heads=8,
        )


AXES: Mapping[str, tuple[int, ...]] = {
    "layers": (4, 8, 16, 32, 64),
    "experts": (8, 32, 128, 512),
    "tokens": (2048, 8192, 32768, 131072),
    "ranks": (1, 2),
}
# With less to share, ranks would only show what it takes to start them.
SHARED_TOKENS = 131072


def measure(case: Case, preset: str) -> dict[str, Any]:
    """Converts the model of a case."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        size = write_checkpoint(source, case.shape(), sequences=case.tokens // LENGTH, length=LENGTH)
        words = ["--experts", str(case.experts // 2), "--calibration", str(source / IDS_FILE), "--preset", preset]
        start = time.perf_counter()
        if case.ranks > 1:
            taken = _run_ranks(source, Path(folder) / "result", words, case.ranks)
        else:
            taken = run(source, Path(folder) / "result", words)
            taken = {
                "cpu_seconds": cpu_seconds(taken["whole"]),
                "start_up_cpu_seconds": cpu_seconds(taken["start_up"]),
                "peak_bytes": taken["peak_bytes"],
                "flops": taken["flops"],
            }
        return {"weights_bytes": size, "wall_seconds": time.perf_counter() - start, **taken}


def _run_ranks(source: Path, result: Path, words: list[str], ranks: int) -> dict[str, Any]:
    """Lets several processes share a conversion; CPU seconds are those of all, the peak is that of the first."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "hcsmoe_hub.cli"]
    command = [sys.executable, "-m", *launcher, "convert", str(source), *words]
    command += ["--output", str(result), "--device", "cpu", "--quiet"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = json.loads((result / "hcsmoe.json").read_text())
    shutil.rmtree(result)
    return {
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_bytes": report["peak_memory_bytes"]["process"],
    }


def row(axis: str, value: int, found: dict[str, Any]) -> str:
    """A conversion as a row of the table."""
    start = f"{found['start_up_cpu_seconds']:.1f} s" if "start_up_cpu_seconds" in found else ""
    counted = f"{found['flops'] / 1e12:.2f} TFLOP" if "flops" in found else ""
    cells = [axis, f"{value:,}", f"{found['weights_bytes'] / 1e6:.0f} MB", counted]
    cells += [f"{found['wall_seconds']:.1f} s", f"{found['cpu_seconds']:.1f} s", start]
    return f"| {' | '.join(cells)} | {found['peak_bytes'] / 2**20:.0f} MiB |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--preset", default="reap")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    chosen = parser.parse_args()
    print("| axis | value | weights | counted | wall | CPU | of it start-up | peak |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    results = []
    for axis in chosen.axes:
        for value in AXES[axis]:
            base = Case(tokens=SHARED_TOKENS) if axis == "ranks" else Case()
            found = measure(replace(base, **{axis: value}), chosen.preset)
            results.append({"axis": axis, "value": value, **found})
            print(row(axis, value, found), flush=True)
    peaks = [found["peak_bytes"] for found in results if found["axis"] == "layers" and found["value"] >= Case.layers]
    if peaks:
        print(f"\nLargest against smallest peak, 8 layers and more: {max(peaks) / min(peaks) - 1:+.1%}")
    if chosen.json:
        chosen.json.write_text(
            json.dumps({"machine": machine(), "preset": chosen.preset, "results": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
