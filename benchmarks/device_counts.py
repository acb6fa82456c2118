"""Counts what layers of full-size models cost on an accelerator: memory, launches, waits and copies.

Run: PYTHONPATH=tests/accelerator python benchmarks/device_counts.py [--models mixtral qwen3] [--recipes reap ...]
     [--capacities] [--json FILE]

Nothing is timed. The layers have a 32nd of the hidden size, neurons, vocabulary and tokens of the published models, and
all of their experts; so have micro-batches and every constant of the program that counts tokens, and constants that
count bytes or elements have a 1024th. Memory is then a 1024th of the real one, and launches, waits and copies are as
many as the real ones. Figures are printed and recorded at full size. The accelerator is that of tests/accelerator.

``--capacities`` gives the accelerator from 110 % down to 30 % of the peak, in ten steps, and says what becomes of it.
"""

import argparse
import gc
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import numpy as np
import torch
from pretended import CAPACITY, Counts, switch_on
from transformers import AutoConfig, AutoModelForCausalLM

import hcsmoe_hub
from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, convert, plan
from hcsmoe_hub.errors import HcsmoeError
from hcsmoe_hub.machine.versions import installed_versions
from hcsmoe_hub.planning.estimate import estimate_needs

LENGTHS = 32
BYTES = LENGTHS**2
# Per layer is what the second number of layers costs more than the first, divided by their difference.
LAYERS = (2, 4)
# Constants of the program that count tokens, and those that count bytes or elements of matrices.
TOKEN_CONSTANTS = (
    "BATCH_TOKENS",
    "CALL_TOKENS",
    "CHUNK_TOKENS",
    "COMPARED_TOKENS",
    "ENERGY_TOKENS",
    "ERROR_TOKENS",
    "GRAM_TOKENS",
    "HOST_ROWS",
    "JUDGED_TOKENS",
    "LEAST_TOKENS",
    "MEASURED_TOKENS",
    "MOST_TOKENS",
    "ROUTER_TOKENS",
    "STEP_TOKENS",
    "STRETCH_TOKENS",
    "_BUSY_TOKENS",
    "_LEAST_TOKENS",
    "_PART_TOKENS",
    "_ROUTER_TOKENS",
)
BYTE_CONSTANTS = (
    "BLOCK",
    "BLOCK_ELEMENTS",
    "BUFFER_BYTES",
    "CHUNK",
    "CHUNK_ELEMENTS",
    "ENERGY_CHUNK",
    "KEPT_BYTES",
    "LOGITS_BYTES",
    "OUTPUTS_BYTES",
    "STAGING_BYTES",
)
MODELS: Mapping[str, dict[str, Any]] = {
    "mixtral": {
        "model_type": "mixtral",
        "hidden_size": 4096 // LENGTHS,
        "intermediate_size": 14336 // LENGTHS,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 32000 // LENGTHS,
    },
    "qwen3": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048 // LENGTHS,
        "moe_intermediate_size": 768 // LENGTHS,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 151936 // LENGTHS,
    },
}
# Options of the method, and thousands of tokens.
RECIPES: Mapping[str, tuple[dict[str, str], int]] = {
    "reap": ({"preset": "reap"}, 131),
    "hc-smoe": ({"preset": "hc-smoe"}, 65),
    "m-smoe": ({"preset": "m-smoe"}, 65),
    "hc-refit": ({"preset": "hc-refit"}, 131),
    "reap, refit down": ({"preset": "reap", "refit": "down"}, 131),
    "hc-smoe, zipit": ({"preset": "hc-smoe", "merge": "zipit"}, 65),
    "hc-smoe, router fit": ({"preset": "hc-smoe", "router": "fit"}, 65),
    "hc-refit, original states": ({"preset": "hc-refit", "propagate": "original"}, 131),
}
SCARCE = ("reap", "hc-smoe", "hc-refit")
SHARES = tuple(float(share) for share in np.linspace(1.1, 0.3, 10).round(3))


def scale_constants() -> None:
    """Divides the constants of all modules that a conversion uses, wherever they were imported to."""
    for found in walk_packages(hcsmoe_hub.__path__, "hcsmoe_hub."):
        if found.name.split(".")[1] not in ("cli", "evaluation", "model_cards"):
            import_module(found.name)
    modules = [module for name, module in sys.modules.items() if name.startswith("hcsmoe_hub.")]
    for module in modules:
        for names, factor in ((TOKEN_CONSTANTS, LENGTHS), (BYTE_CONSTANTS, BYTES)):
            for name in names:
                value = vars(module).get(name)
                if isinstance(value, int):
                    setattr(module, name, max(1, value // factor))


def build(folder: Path, model: str, layers: int) -> Path:
    """Writes layers of a model, with random weights in bfloat16."""
    torch.manual_seed(0)
    common = {"num_hidden_layers": layers, "max_position_embeddings": 4096, "tie_word_embeddings": False}
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[model], **common))
    network.to(torch.bfloat16).save_pretrained(folder, save_original_format=True)
    return folder


class Bench:
    """Runs recipes on one model.

    Args:
        device: The accelerator.
        folder: A folder of its own.
        model: Name of the model.
    """

    def __init__(self, device: Any, folder: Path, model: str) -> None:
        self._device = device
        self._folder = folder
        self._model = model
        self._sources = {layers: build(folder / f"{model}-{layers}", model, layers) for layers in LAYERS}
        experts = MODELS[model].get("num_experts") or MODELS[model]["num_local_experts"]
        self._experts = experts // 2

    def _options(self, recipe: str, name: str) -> ConvertOptions:
        method, thousands = RECIPES[recipe]
        length = 2048 // LENGTHS
        ids = self._folder / f"{thousands}.npy"
        rows = {65: 32, 131: 64}[thousands]
        np.save(ids, np.random.default_rng(0).integers(4, MODELS[self._model]["vocab_size"], (rows, length)))
        return ConvertOptions(
            experts=self._experts,
            method=MethodOptions(**method),
            calibration=CalibrationOptions(dataset=str(ids), feature_tokens=2048 // LENGTHS),
            batch_tokens=8192 // LENGTHS,
            device="cuda",
            output=self._folder / name,
            overwrite=True,
        )

    def _labels(self, options: ConvertOptions, layers: int = LAYERS[0]) -> list[Any]:
        return [layer["labels"] for layer in convert(self._sources[layers], options).as_dict()["layers"]]

    def count(self, recipe: str) -> dict[str, Any]:
        """What a recipe costs: bytes in all, and everything else per layer, at full size."""
        options = self._options(recipe, "counted")
        planned = estimate_needs(plan(self._sources[LAYERS[1]], options)).device_bytes
        found = []
        for layers in LAYERS:
            with Counts(self._device) as counts:
                self._labels(options, layers)
            found.append((counts.launches, counts.waits, counts.up, counts.down))
        peak = self._device.memory()["peak"]
        launches, waits, up, down = (
            (more - fewer) // (LAYERS[1] - LAYERS[0]) for fewer, more in zip(*found, strict=True)
        )
        return {
            "model": self._model,
            "recipe": recipe,
            "tokens": RECIPES[recipe][1] * 1000,
            "planned_device_bytes": planned * BYTES,
            "peak_device_bytes": peak * BYTES,
            "planned_over_peak": round(planned / peak, 3),
            "launches": launches,
            "waits": waits,
            "bytes_up": up * BYTES,
            "bytes_down": down * BYTES,
            "lines_of_whole_run": [
                {"kind": kind, "line": line, "count": count, "bytes": counts.bytes[kind, line] * BYTES}
                for (kind, line), count in counts.events.most_common(20)
            ],
        }

    def capacities(self, recipe: str) -> Iterator[dict[str, Any]]:
        """What becomes of a recipe on ever smaller accelerators."""
        options = self._options(recipe, "whole")
        self._device.reset(True)
        labels = self._labels(options)
        peak = self._device.memory()["peak"]
        for share in SHARES:
            # What is left of a conversion that failed would be in the way of the next one.
            shutil.rmtree(self._folder / "scarce", ignore_errors=True)
            gc.collect()
            self._device.reset(True)
            self._device.limit(int(peak * share))
            try:
                outcome = "done" if self._labels(self._options(recipe, "scarce")) == labels else "other labels"
            except HcsmoeError as error:
                outcome = f"{error.message} ({error.hint})"
            except RuntimeError as error:
                outcome = f"TRACEBACK {type(error).__name__}: {str(error).splitlines()[0]}"
            self._device.limit(CAPACITY)
            yield {"model": self._model, "recipe": recipe, "share": share, "outcome": outcome}


def line_of(found: Mapping[str, Any]) -> str:
    """A row of the table."""
    sizes = [found[name] / 1e9 for name in ("planned_device_bytes", "peak_device_bytes", "bytes_up", "bytes_down")]
    planned, peak, up, down = (f"{size:.1f} GB" for size in sizes)
    what = f"| {found['model']} | {found['recipe']} | {found['tokens'] // 1000}k | {planned} | {peak} "
    return what + f"| {found['launches']:,} | {found['waits']:,} | {up} | {down} |"


def record(results: Mapping[str, Any], file: Path | None) -> None:
    """Writes what has been found so far, if a file was asked for."""
    if file is not None:
        file.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    """Counts every recipe of every model, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES)
    parser.add_argument("--capacities", action="store_true")
    parser.add_argument("--lines", action="store_true", help="also print the lines that wait or copy most often")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = switch_on(has_bf16=True)
    scale_constants()
    results: dict[str, Any] = {"versions": installed_versions(), "counts": [], "capacities": []}
    columns = ("model", "recipe", "tokens", "planned", "peak", "launches", "waits", "up", "down")
    print("| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models:
            bench = Bench(device, Path(folder), model)
            for recipe in arguments.recipes or (SCARCE if arguments.capacities else RECIPES):
                if arguments.capacities:
                    for outcome in bench.capacities(recipe):
                        results["capacities"].append(outcome)
                        record(results, arguments.json)
                        print(f"{model} {recipe} {outcome['share']:.0%}: {outcome['outcome']}", flush=True)
                    continue
                found = bench.count(recipe)
                results["counts"].append(found)
                record(results, arguments.json)
                print(line_of(found), flush=True)
                if arguments.lines:
                    print(*found["lines_of_whole_run"], sep="\n", flush=True)


if __name__ == "__main__":
    main()
