"""Measures what several ranks on one machine save: the same conversion by one process and by several.

Run: python benchmarks/ranks.py CHECKPOINT --calibration FILE [--experts K] [--preset NAME] [--repeat N] [--json FILE]

Every case is a fresh start of the command: ranks times threads. CPU seconds are those of all processes, start-up
included; the seconds of a stage are from the report. Of several runs of a case the fastest counts.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from hcsmoe_hub.machine.versions import tool

CASES = ((1, 1), (1, 2), (2, 1))


class Run(NamedTuple):
    """One conversion.

    Attributes:
        ranks: Processes.
        threads: Threads of each.
        wall: Seconds from start to end.
        cpu: CPU seconds of all processes.
        convert: Seconds of the stage that converts.
        peak: Peak resident bytes of the first rank.
        labels: Cluster of every expert, by layer.
    """

    ranks: int
    threads: int
    wall: float
    cpu: float
    convert: float
    peak: int
    labels: list[list[int]]


def measure(words: list[str], *, ranks: int, threads: int) -> Run:
    """Runs the command once."""
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "result"
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
        command = [sys.executable, "-m", *launcher, "hcsmoe_hub.cli", "convert", *words, "--output", str(output), "-q"]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        report = json.loads((output / "hcsmoe.json").read_text())
    return Run(
        ranks=ranks,
        threads=threads,
        wall=round(wall, 1),
        cpu=round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        convert=report["timings_seconds"]["convert"],
        peak=report["peak_memory_bytes"]["process"],
        labels=[layer["labels"] for layer in report["layers"]],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--experts", default="4")
    parser.add_argument("--preset", default="reap")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    words = [chosen.checkpoint, "--experts", chosen.experts, "--preset", chosen.preset, "--device", "cpu"]
    words += ["--calibration", chosen.calibration]
    found = []
    print("ranks  threads  wall s  CPU s  convert s  peak GB")
    for ranks, threads in CASES:
        runs = [measure(words, ranks=ranks, threads=threads) for _ in range(chosen.repeat)]
        best = min(runs, key=lambda run: run.wall)
        found.append(best)
        print(
            f"{ranks:5}  {threads:7}  {best.wall:6}  {best.cpu:5}  {best.convert:9}  {best.peak / 1e9:7.2f}", flush=True
        )
    assert all(run.labels == found[0].labels for run in found), "all cases must merge or keep the same experts"
    if chosen.json is not None:
        rows = [{name: value for name, value in run._asdict().items() if name != "labels"} for run in found]
        content = {"tool": tool(), "cores": os.cpu_count(), "preset": chosen.preset, "runs": rows}
        chosen.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
