"""Whether the device gives the host's results: labels equal, tensors near, and two runs on the device bit for bit."""

import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_checkpoints import Shape, token_ids, write_model
from gpu_run import FAILURES, Run
from safetensors.torch import load_file
from torch import Tensor

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, convert, options
from hcsmoe_hub.options import Preset
from hcsmoe_hub.report import ConversionReport

# Relative distance of a tensor from the host's. Gradient descent follows roundings, least squares does not.
NEAR, NEAR_BFLOAT16, NEAR_DESCENT = 1e-3, 5e-2, 1e-1
RECIPES: dict[str, MethodOptions] = {
    "hc-refit": MethodOptions(preset=Preset.HC_REFIT),
    "hc-smoe": MethodOptions(preset=Preset.HC_SMOE),
    "m-smoe": MethodOptions(preset=Preset.M_SMOE),
    "reap": MethodOptions(preset=Preset.REAP),
    "reap, refit down": MethodOptions(preset=Preset.REAP, refit=options.Refit.DOWN),
    "reap, refit block": MethodOptions(preset=Preset.REAP, refit=options.Refit.BLOCK),
    "merged, refit down": MethodOptions(
        preset=Preset.HC_SMOE, refit=options.Refit.DOWN, propagate=options.Propagate.MERGED
    ),
    "router fit": MethodOptions(preset=Preset.HC_SMOE, router=options.RouterPolicy.FIT),
    "mapped": MethodOptions(preset=Preset.HC_SMOE, layout=options.Layout.MAPPED),
    "neurons": MethodOptions(preset=Preset.HC_SMOE, merge=options.Merge.NEURONS),
    "zipit": MethodOptions(preset=Preset.HC_SMOE, merge=options.Merge.ZIPIT),
    "align": MethodOptions(preset=Preset.HC_SMOE, align=options.Align.ACTIVATION),
    "reconstruction": MethodOptions(preset=Preset.REAP, saliency=options.Saliency.RECONSTRUCTION),
}
IN_DRY_RUN = ("hc-refit", "reap", "zipit")
# Share of the budget that is kept for the layers of full width.
FOR_LAYERS = 0.55


def convert_with(
    source: Path, method: MethodOptions, *, device: str, ids: Path, output: Path, experts: int, **more: Any
) -> ConversionReport:
    """One conversion of random token ids; other keywords are those of ``ConvertOptions``, or the ``listener``."""
    keywords = {"listener": more.pop("listener")} if "listener" in more else {}
    wanted = ConvertOptions(
        experts=experts,
        method=method,
        calibration=CalibrationOptions(dataset=str(ids)),
        device=device,
        output=output,
        overwrite=True,
        **more,
    )
    return convert(source, wanted, **keywords)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def check_correctness(run: Run) -> None:
    """Compares both devices on every recipe and model, and keeps a row for each as ``correct``."""
    shape = Shape(
        kind="mixtral",
        hidden=64,
        neurons=96,
        experts=8,
        top_k=2,
        heads=4,
        key_heads=2,
        head=16,
        vocabulary=512,
        dtype=torch.float32,
    )
    qwen = replace(shape, kind="qwen3_moe", experts=16, top_k=4)
    sources = {
        "mixtral": (write_model(run, "correct-mixtral", shape), 512, 4),
        "qwen3": (write_model(run, "correct-qwen3", qwen), 512, 8),
    }
    if run.models is not None and (run.models / "example-mixtral").is_dir():
        sources["example-mixtral"] = (run.models / "example-mixtral", 4096, 4)
    for model, (source, vocabulary, experts) in sources.items():
        ids = token_ids(run, 8 if run.is_tiny else 32, 64, vocabulary)
        for recipe in IN_DRY_RUN if run.is_tiny else RECIPES:
            if run.left < FOR_LAYERS * run.budget and not run.is_tiny:
                run.keep("skipped", [*run.found["skipped"], f"correct {model}: {recipe}"])
                continue
            row = _compared(run, source, recipe, ids, experts)
            run.keep_row("correct", f"{model}: {recipe}", row)
            run.say(f"  {row['verdict']:4} {model}: {recipe}: {row}")
    _check_repeats(run, *sources["mixtral"])


def _compared(run: Run, source: Path, recipe: str, ids: Path, experts: int) -> dict[str, Any]:
    """What one recipe gives on the host and on the device."""
    results, seconds = {}, {}
    try:
        for place, device in (("host", "cpu"), ("device", str(run.device))):
            output, begin = run.scratch / f"out-{place}", time.perf_counter()
            report = convert_with(
                source, RECIPES[recipe], device=device, ids=ids, output=output, experts=experts, batch_tokens=1024
            )
            results[place] = report.as_dict()["layers"], tensors_of(output)
            seconds[place] = round(time.perf_counter() - begin, 2)
    except FAILURES:
        return {"verdict": "FAIL", "error": traceback.format_exc()}
    (layers, host), (others, device_tensors) = results["host"], results["device"]
    worst = max(_distance(host[name], device_tensors[name]) for name in host)
    is_bfloat16 = any(tensor.dtype == torch.bfloat16 for tensor in host.values())
    is_descent = recipe == "hc-refit" or "block" in recipe
    near = NEAR_DESCENT if is_descent else NEAR_BFLOAT16 if is_bfloat16 else NEAR
    row = {
        "labels_equal": [layer["labels"] for layer in layers] == [layer["labels"] for layer in others],
        "equal_tensors": sum(host[name].equal(device_tensors[name]) for name in host),
        "tensors": len(host),
        "worst": worst,
        "output_error_differs": max(
            abs(one["output_error"] - two["output_error"]) for one, two in zip(layers, others, strict=True)
        ),
        "seconds": seconds,
    }
    return {"verdict": "ok" if row["labels_equal"] and worst < near else "LOOK", **row}


def _distance(one: Tensor, two: Tensor) -> float:
    """Relative distance; infinite where values are not finite."""
    difference = float((one.double() - two.double()).norm() / (one.double().norm() + 1e-30))
    return difference if bool(two.double().isfinite().all()) else float("inf")


def _check_repeats(run: Run, source: Path, vocabulary: int, experts: int) -> None:
    ids, results = token_ids(run, 8, 64, vocabulary), []
    for number in range(2):
        output = run.scratch / f"again-{number}"
        convert_with(
            source, RECIPES["reap, refit down"], device=str(run.device), ids=ids, output=output, experts=experts
        )
        results.append(tensors_of(output))
    is_equal = all(results[0][name].equal(results[1][name]) for name in results[0])
    run.keep("repeats", is_equal)
    run.say(f"  two runs on the device are {'bit-identical' if is_equal else 'NOT identical'}")
