"""Measures what different recipes leave of a model: perplexity, choices, agreement with the source.

Run: python benchmarks/quality.py --model FOLDER [FOLDER ...] --calibration FILE --text FILE --choices FILE [--keep 0.5]
     [--records N] [--seeds 42 43] [--only WORD] [--json FILE]

Every recipe converts every model once per seed, on the same calibration text; a seed changes which documents are drawn
and every random choice of the method. All figures come from ``hcsmoe_hub.evaluation``, as those of ``hcsmoe evaluate``
do. ``--records`` takes that many evenly spaced records of each file.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hcsmoe_hub import CalibrationOptions, ConvertOptions, HcsmoeError, MethodOptions, convert
from hcsmoe_hub.checkpoint.source import open_source
from hcsmoe_hub.evaluation.evaluate import evaluate
from hcsmoe_hub.evaluation.options import EvaluateOptions
from hcsmoe_hub.model import read_model
from hcsmoe_hub.options import (
    Align,
    Budget,
    Clustering,
    Correct,
    Distance,
    Dominant,
    Layout,
    Merge,
    Method,
    Saliency,
    Similarity,
)

M_SMOE = MethodOptions(
    clustering=Clustering.SINGLE_SHOT,
    similarity=(Similarity.ROUTER_LOGITS,),
    budget=Budget.M_SMOE,
    align=Align.WEIGHT,
    layout=Layout.FULL,
)
SALIENT = MethodOptions(
    clustering=Clustering.SINGLE_SHOT,
    distance=Distance.EUCLIDEAN,
    dominant=Dominant.SALIENCY,
    align=Align.ACTIVATION,
    merge=Merge.SALIENCY,
)
PLAIN: Mapping[str, MethodOptions] = {
    "HC-SMoE, full router": MethodOptions(layout=Layout.FULL),
    "M-SMoE, full router": M_SMOE,
    "HC-SMoE": MethodOptions(),
    "HC-SMoE, aligned": MethodOptions(align=Align.ACTIVATION),
    "around salient experts, aligned": SALIENT,
    "random groups": MethodOptions(clustering=Clustering.RANDOM),
    "F-prune": MethodOptions(method=Method.PRUNE, saliency=Saliency.FREQUENCY),
    "S-prune": MethodOptions(method=Method.PRUNE, saliency=Saliency.ROUTING_SCORE),
    "REAP": MethodOptions(method=Method.PRUNE, saliency=Saliency.REAP),
    "reconstruction": MethodOptions(method=Method.PRUNE, saliency=Saliency.RECONSTRUCTION),
}
RECIPES = {
    **PLAIN,
    **{
        f"{name} + correct": replace(method, correct=Correct.DOWN)
        for name, method in PLAIN.items()
        if method.layout is Layout.REDUCED
    },
}


def thinned(file: Path, records: int | None, folder: Path) -> Path:
    """A file with that many evenly spaced lines of another; the other itself if all are wanted."""
    lines = file.read_text("utf-8").splitlines()
    if records is None or records >= len(lines):
        return file
    chosen = [lines[number * len(lines) // records] for number in range(records)]
    target = folder / file.name
    target.write_text("\n".join(chosen) + "\n", "utf-8")
    return target


def measure(model: Path, experts: int, method: MethodOptions, wanted: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Converts and evaluates; a refusal becomes the row's only figure."""
    with tempfile.TemporaryDirectory() as scratch:
        options = ConvertOptions(
            experts=experts,
            method=replace(method, seed=seed),
            calibration=CalibrationOptions(
                dataset=str(wanted.calibration), samples=wanted.samples, sequence_length=wanted.length, seed=seed
            ),
            output=Path(scratch) / "result",
        )
        start = time.perf_counter()
        try:
            report = convert(model, options)
        except HcsmoeError as error:
            return {"refused": error.message}
        seconds = time.perf_counter() - start
        asked = EvaluateOptions(perplexity=wanted.text, choices=wanted.choices, output=Path(scratch) / "figures.json")
        measures = evaluate(options.output or scratch, asked, base=model)[0]["measures"]
    perplexity, choices = measures["perplexity"], measures["choices"]
    before, after = perplexity["base"]["overall"]["perplexity"], perplexity["model"]["overall"]["perplexity"]
    return {
        "perplexity": after,
        "ratio": after / before,
        "base_perplexity": before,
        "accuracy": choices["model"]["overall"]["accuracy"],
        "base_accuracy": choices["base"]["overall"]["accuracy"],
        "top_1_agreement": measures["agreement"]["model"]["overall"]["top1_agreement"],
        "output_error": statistics.fmean(layer.output_error for layer in report.layers),
        "seconds": round(seconds, 1),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, nargs="+", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--choices", type=Path, required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5], help="shares of the experts to keep")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens per calibration sequence")
    parser.add_argument("--records", type=int, help="records of each file; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--only", default="", help="recipes whose name contains this")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    wanted = parse()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        wanted.text = thinned(wanted.text, wanted.records, Path(folder))
        wanted.choices = thinned(wanted.choices, wanted.records, Path(folder))
        for model in wanted.model:
            before = read_model(open_source(str(model))).settings.experts
            for share in wanted.keep:
                experts = round(before * share)
                print(f"\n{model.name}, {before} to {experts} experts\n")
                print("| recipe | perplexity ratio | choices | top-1 agreement | output error | seconds |")
                print("|---|---|---|---|---|---|")
                for name, method in RECIPES.items():
                    if wanted.only in name:
                        found = [measure(model, experts, method, wanted, seed) for seed in wanted.seeds]
                        rows.append({"model": model.name, "experts": experts, "recipe": name, "runs": found})
                        print(line(name, found), flush=True)
    if wanted.json is not None:
        settings = {key: str(value) for key, value in vars(wanted).items() if key not in ("model", "json")}
        files = {name: getattr(wanted, name).name for name in ("calibration", "text", "choices")}
        wanted.json.write_text(json.dumps({"settings": settings | files, "rows": rows}, indent=1) + "\n")


def line(name: str, runs: list[dict[str, Any]]) -> str:
    """One row of the table: means over the seeds, and the spread of the ratio if there are several."""
    if any("refused" in run for run in runs):
        return f"| {name} | refused: {runs[0].get('refused')} | | | | |"
    mean = {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}
    ratios = [run["ratio"] for run in runs]
    spread = f" ({min(ratios):.3f} to {max(ratios):.3f})" if len(ratios) > 1 else ""
    shares = (f"{100 * mean[key]:.1f} %" for key in ("accuracy", "top_1_agreement", "output_error"))
    return f"| {name} | {mean['ratio']:.3f}{spread} | {' | '.join(shares)} | {mean['seconds']:.1f} |"


if __name__ == "__main__":
    main()
