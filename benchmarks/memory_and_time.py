"""Measures peak memory and CPU time of a conversion on synthetic Mixtral checkpoints of growing depth.

Run: python benchmarks/memory_and_time.py [--layers 8 32] [--repeats 3] [--json FILE]

Every conversion runs in a fresh process with one thread; the figures are that process's own peak resident set and its
user plus system time, imports included: the largest peak and the median times of the repeats, because system time
depends on how much memory the machine has at hand. Half of the experts are kept. Weights are random: only sizes matter.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, EXPERTS, HEADS, VOCABULARY = 1024, 3584, 8, 16, 1024
SEQUENCES, LENGTH = 8, 512


def write_checkpoint(folder: Path, layers: int) -> int:
    """Writes a random bf16 Mixtral, one shard per layer; returns the bytes of its weights."""
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    weight_map, size = {}, 0
    for number in range(layers + 1):
        shapes = outer_shapes() if number == layers else layer_shapes(number)
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else (torch.randn(shape, generator=generator) * 0.02).bfloat16()
            for name, shape in shapes.items()
        }
        shard = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, VOCABULARY, (SEQUENCES, LENGTH)))
    return size


def outer_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of everything outside the decoder layers."""
    table = (VOCABULARY, HIDDEN)
    return {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (HIDDEN,)}


def layer_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one decoder layer."""
    prefix = f"model.layers.{layer}."
    attention = {"q_proj": HIDDEN, "k_proj": HIDDEN // 2, "v_proj": HIDDEN // 2}
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}self_attn.{name}.weight": (rows, HIDDEN) for name, rows in attention.items()
    }
    shapes[f"{prefix}self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
    shapes[f"{prefix}input_layernorm.weight"] = (HIDDEN,)
    shapes[f"{prefix}post_attention_layernorm.weight"] = (HIDDEN,)
    shapes[f"{prefix}block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
    for expert in range(EXPERTS):
        expert_prefix = f"{prefix}block_sparse_moe.experts.{expert}"
        shapes[f"{expert_prefix}.w1.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{expert_prefix}.w2.weight"] = (HIDDEN, INTERMEDIATE)
        shapes[f"{expert_prefix}.w3.weight"] = (INTERMEDIATE, HIDDEN)
    return shapes


def measure(layers: int, repeats: int) -> dict[str, float]:
    """Converts one synthetic checkpoint several times; returns the largest peak and the median times."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        size = write_checkpoint(source, layers)
        runs = [convert(source, Path(folder) / f"result-{number}") for number in range(repeats)]
    return {
        "layers": layers,
        "weights_bytes": size,
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "cpu_seconds": statistics.median(run["cpu_seconds"] for run in runs),
        "wall_seconds": statistics.median(run["wall_seconds"] for run in runs),
    }


def convert(source: Path, result: Path) -> dict[str, float]:
    """Converts a checkpoint in a fresh process, and reads that process's own resources."""
    command = ["hcsmoe", "convert", str(source), "--experts", str(EXPERTS // 2), "--device", "cpu", "--quiet"]
    command += ["--preset", "hc-smoe"]
    command += ["--calibration", str(source / "ids.npy"), "--output", str(result)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    shutil.rmtree(result)
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "peak_bytes": usage.ru_maxrss * unit,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "wall_seconds": wall,
    }


def main() -> None:
    """Measures every depth and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    print("| layers | weights | peak memory | CPU time | wall time |")
    print("|---|---|---|---|---|")
    results = []
    for layers in arguments.layers:
        found = measure(layers, arguments.repeats)
        results.append(found)
        print(
            f"| {layers} | {found['weights_bytes'] / 1e9:.2f} GB | {found['peak_bytes'] / 2**30:.2f} GiB "
            f"| {found['cpu_seconds']:.1f} s | {found['wall_seconds']:.1f} s |",
            flush=True,
        )
    growth = results[-1]["peak_bytes"] / results[0]["peak_bytes"] - 1
    print(f"\nPeak memory, {results[-1]['layers']} against {results[0]['layers']} layers: {growth:+.1%}")
    if arguments.json:
        machine = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
