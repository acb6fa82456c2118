"""What conversions of well-known checkpoints would need and leave, planned from configs and tensor headers alone.

Run: python benchmarks/known_models.py [--json FILE] [--folder REPO_ID=FOLDER ...]

Every model is planned with the default preset and with ``reap``, which prunes and refits nothing. No weight is read.
Layers are computed in bfloat16; on a CPU without instructions for it they are in float32, and take about twice the
memory. ``--folder`` plans a model from a local copy of its repository instead of the Hub. Arithmetic is counted, not
measured; divide it by the sustained throughput of your hardware for a time.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from hcsmoe_hub import ConvertOptions, MethodOptions, Preset
from hcsmoe_hub.checkpoint.config_json import quantization_method
from hcsmoe_hub.hub.open import open_source
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.estimate import estimate_needs
from hcsmoe_hub.planning.make import make_plan
from hcsmoe_hub.planning.sizes import active_parameter_counts, parameter_counts, weight_bytes
from hcsmoe_hub.recipe.presets import DEFAULT_PRESET

# Experts to keep: three quarters or half, and what lets DeepSeek-V2-Lite and Qwen3-30B-A3B fit 24 GB.
KEPT: dict[str, tuple[int, ...]] = {
    "mistralai/Mixtral-8x7B-v0.1": (6, 4),
    "Qwen/Qwen3-30B-A3B": (96, 64, 40),
    "openai/gpt-oss-20b": (24, 16),
    "deepseek-ai/DeepSeek-V2-Lite": (48, 40, 32),
    "allenai/OLMoE-1B-7B-0924": (48, 32),
    # The models of M-SMoE, which keeps 8 of the 32 experts of the third.
    "google/switch-base-8": (6, 4),
    "google/switch-base-16": (8,),
    "google/switch-base-32": (16, 8),
    "google/switch-base-64": (32,),
    "google/switch-base-128": (64,),
    "google/switch-base-256": (128,),
    "facebook/nllb-moe-54b": (96, 64),
}
# Whose conversion to half of the experts is in the README's table.
IN_README = (
    "mistralai/Mixtral-8x7B-v0.1",
    "Qwen/Qwen3-30B-A3B",
    "openai/gpt-oss-20b",
    "deepseek-ai/DeepSeek-V2-Lite",
    "allenai/OLMoE-1B-7B-0924",
)
PRESETS = (DEFAULT_PRESET, Preset.REAP)


def planned(source: str, experts: int, preset: Preset) -> ConversionPlan:
    """A conversion on a CPU that computes in bfloat16, with the calibration that ``convert`` uses by default."""
    options = ConvertOptions(experts=experts, method=MethodOptions(preset=preset), device="cpu")
    return make_plan(open_source(source), options, compute=torch.bfloat16)


def counted(source: str, experts: int) -> dict[str, Any]:
    """Sizes of a conversion, and what each preset needs: bytes of memory and floating-point operations."""
    plans = {preset: planned(source, experts, preset) for preset in PRESETS}
    needs = {preset: estimate_needs(each) for preset, each in plans.items()}
    first = plans[PRESETS[0]]
    model = first.model
    return {
        "experts": {"before": model.settings.experts, "after": experts, "per_token": model.settings.experts_per_token},
        "parameters": parameter_counts(first),
        "active_parameters": active_parameter_counts(first),
        "weights_bytes": weight_bytes(first),
        "quantization": quantization_method(model.source.config),
        "calibration_tokens": {preset: each.calibration.tokens for preset, each in plans.items()},
        "memory_bytes": {preset: each.memory_bytes for preset, each in needs.items()},
        "flops": {preset: each.flops for preset, each in needs.items()},
    }


def row(repo_id: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    experts, parameters, active = (found[name] for name in ("experts", "parameters", "active_parameters"))
    weights, memory, flops = (found[name] for name in ("weights_bytes", "memory_bytes", "flops"))
    cells = [
        repo_id.split("/")[-1],
        f"{experts['before']} → {experts['after']}",
        " → ".join(f"{parameters[name] / 1e9:.1f} B" for name in ("before", "after")),
        " → ".join(f"{active[name] / 1e9:.2f} B" for name in ("before", "after")),
        " → ".join(f"{weights[name] / 1e9:.1f} GB" for name in ("before", "after")),
        *(f"{memory[preset] / 1e9:.1f} GB" for preset in PRESETS),
        *(f"{flops[preset] / 1e15:.1f} PFLOP" for preset in PRESETS),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--folder", action="append", default=[], metavar="REPO_ID=FOLDER")
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    folders = dict(each.split("=", 1) for each in wanted.folder)
    names = ("experts", "parameters", "active", "weights")
    columns = ["model", *names, *(f"{name}: {preset}" for name in ("memory", "arithmetic") for preset in PRESETS)]
    print(f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", sep="\n")
    found: dict[str, list[dict[str, Any]]] = {}
    for repo_id, counts in KEPT.items():
        found[repo_id] = []
        for experts in counts:
            each = counted(folders.get(repo_id, repo_id), experts)
            each["in_readme"] = repo_id in IN_README and 2 * experts == each["experts"]["before"]
            found[repo_id].append(each)
            print(row(repo_id, found[repo_id][-1]), flush=True)
    if wanted.json is not None:
        wanted.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
