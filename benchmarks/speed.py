"""Measures conversions of two synthetic models on the host, next to what the machine can do at best.

Run: python benchmarks/speed.py [--models mixtral qwen2_moe] [--presets hc-smoe reap] [--layers 8] [--json FILE]

Every conversion runs in a fresh process with one thread on 8 x 512 tokens and keeps half of the experts. Its limits are
measured next to it: reading the checkpoint and writing as much as the result in sequence on the same disk, and matrix
products of the shapes and in the dtype that the experts have. Every conversion also runs with ``--no-checkpoint``, to
know what going on after an interruption costs. ``--quick`` leaves out the default recipe, which also refits experts.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fresh_process import cpu_seconds, machine, run
from synthetic import IDS_FILE, Shape, write_checkpoint
from torch.nn import functional

SEQUENCES, LENGTH = 8, 512
SHAPES = {
    "mixtral": Shape(family="mixtral", hidden=1024, width=3584, layers=8, experts=8, active=2),
    "qwen2_moe": Shape(family="qwen2_moe", hidden=1024, width=704, layers=8, experts=60, active=4),
}
BLOCK_BYTES = 8 * 2**20
DEFAULT = "default"


def measure(shape: Shape, presets: list[str], folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Converts one model with every preset.

    Args:
        shape: The model.
        presets: Names of presets, ``default`` for none.
        folder: Where checkpoint and results are written.
        repeats: Conversions per preset, of which the one with the median CPU time counts; the peak is the largest.
    """
    source = folder / "source"
    source.mkdir()
    size = write_checkpoint(source, shape, sequences=SEQUENCES, length=LENGTH)
    found = []
    for preset in presets:
        words = ["--experts", str(shape.experts // 2), "--calibration", str(source / IDS_FILE)]
        words += [] if preset == DEFAULT else ["--preset", preset]
        runs, without = [], []
        for _ in range(repeats):
            forget(source)
            runs.append(run(source, folder / "result", words))
            forget(source)
            without.append(run(source, folder / "result", [*words, "--no-checkpoint"]))
        chosen, bare = _typical(runs), _typical(without)
        chosen["peak_bytes"] = max(taken["peak_bytes"] for taken in runs)
        chosen["without_checkpoint"] = bare["whole"]
        limits = limits_of(shape, source, chosen)
        found.append(
            {
                "model": shape.family,
                "preset": preset,
                "weights_bytes": size,
                **chosen,
                **limits,
                **_ratios(chosen, limits),
            }
        )
    return found


def _typical(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the median CPU time."""
    return sorted(runs, key=lambda taken: cpu_seconds(taken["whole"]))[len(runs) // 2]


def limits_of(shape: Shape, source: Path, taken: dict[str, Any]) -> dict[str, float]:
    """What this machine needs at least: seconds of reading and of writing in sequence, and products per second."""
    forget(source)
    dtype = getattr(torch, taken["compute_dtype"])
    return {
        "sequential_read_seconds": _elapsed(lambda: _read(source)),
        "sequential_write_seconds": _elapsed(lambda: _write(source.parent / "scratch", taken["result_bytes"])),
        "flops_per_second": product_rate(shape, dtype),
    }


def product_rate(shape: Shape, dtype: torch.dtype) -> float:
    """Best operations per CPU second of an expert's three products for the tokens that it gets on average."""
    rows = SEQUENCES * LENGTH * shape.active // shape.experts
    states, inner = torch.randn(rows, shape.hidden, dtype=dtype), torch.randn(rows, shape.width, dtype=dtype)
    up, down = (
        torch.randn(2 * shape.width, shape.hidden, dtype=dtype),
        torch.randn(shape.hidden, shape.width, dtype=dtype),
    )

    def products() -> float:
        start = time.process_time()
        functional.linear(states, up)
        functional.linear(inner, down)
        return time.process_time() - start

    return 6 * rows * shape.hidden * shape.width / min(products() for _ in range(20))


def forget(folder: Path) -> None:
    """Drops the files of a folder from the page cache, where the system can do that."""
    if hasattr(os, "posix_fadvise"):
        for file in folder.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(folder: Path) -> None:
    block = bytearray(BLOCK_BYTES)
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(block):
                pass


def _write(path: Path, size: int) -> None:
    block = os.urandom(BLOCK_BYTES)
    with path.open("wb", buffering=0) as opened:
        for start in range(0, size, BLOCK_BYTES):
            opened.write(block[: min(BLOCK_BYTES, size - start)])
        os.fsync(opened.fileno())
    path.unlink()


def _elapsed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _ratios(taken: dict[str, Any], limits: dict[str, float]) -> dict[str, float]:
    """Time of the layers, as a multiple of what the disk and the products take."""
    whole, bare = cpu_seconds(taken["whole"]), cpu_seconds(taken["without_checkpoint"])
    wall = taken["layers"]["wall"] - taken["start_up"]["wall"]
    cpu = cpu_seconds(taken["layers"]) - cpu_seconds(taken["start_up"])
    return {
        "wall_to_disk": wall / (limits["sequential_read_seconds"] + limits["sequential_write_seconds"]),
        "cpu_to_products": cpu * limits["flops_per_second"] / taken["flops"],
        "checkpoint_share": whole / bare - 1,
    }


def row(found: dict[str, Any]) -> str:
    """A conversion as a row of the table."""
    whole, start = found["whole"], cpu_seconds(found["start_up"])
    cells = [
        found["model"],
        found["preset"],
        f"{whole['wall']:.1f} s",
        f"{whole['user']:.1f} + {whole['system']:.1f} s",
        f"{start:.1f} s",
        f"{found['peak_bytes'] / 2**30:.2f} GiB",
        f"{found.get('read_bytes', 0) / 1e9:.2f} / {found.get('written_bytes', 0) / 1e9:.2f} GB",
        f"{found['flops'] / 1e12:.2f} TFLOP",
        f"{found['flops_per_second'] / 1e9:.0f} GFLOP/s",
        f"{found['wall_to_disk']:.2f}",
        f"{found['cpu_to_products']:.2f}",
        f"{found['checkpoint_share']:+.1%}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--presets", nargs="+", default=["hc-smoe", "reap"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="leave out the default recipe")
    parser.add_argument("--folder", type=Path, help="where checkpoints and results are written: the disk that counts")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    presets = chosen.presets + ([] if chosen.quick else [DEFAULT])
    print(
        "| model | preset | wall | CPU: user + system | start-up CPU | peak | read / written | counted | rate "
        "| wall : disk | CPU : products | resume |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    results: list[dict[str, Any]] = []
    for name in chosen.models:
        with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
            found = measure(replace(SHAPES[name], layers=chosen.layers), presets, Path(folder), chosen.repeats)
        print("\n".join(map(row, found)), flush=True)
        results += found
    starts = [cpu_seconds(found["start_up"]) for found in results]
    print(f"\nStart-up: {statistics.median(starts):.1f} s of CPU (median)")
    if chosen.json:
        content = {"machine": machine(), "layers": chosen.layers, "tokens": SEQUENCES * LENGTH, "results": results}
        chosen.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
