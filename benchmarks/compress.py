"""Compares compressed experts (MC-SMoE's second half) with narrower and with fewer experts: error, bytes, operations.

Run: OMP_NUM_THREADS=1 python benchmarks/compress.py MODEL CALIBRATION [--experts K] [--rows NAME ...] [--json FILE]

MODEL is a checkpoint with a Mixtral-like config, CALIBRATION a text file, of which a part is held out. Experts are
grouped, merged and routed as by default, without a refit. Then their matrices stay whole; or become factors of the
paper's rank of 32 with 10 % of the rows of S, alone, or at the paper's share of the smaller side; or experts are
narrower, with as many numbers as the paper's factors. ``fewer`` has half of the experts instead. The file keeps rows
that are not named.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, convert

# Rank 32 of matrices of 768 x 3072, 10 % of the rows kept (arXiv 2310.01334).
RANK, SPARSITY, SMALLER_SIDE = 32, 0.9, 768
SEQUENCES, LENGTH = 48, 512


def equal_width(hidden: int, neurons: int) -> int:
    """Neurons of an expert of three matrices with as many numbers as the paper's factors."""
    kept = [side - round(SPARSITY * side) for side in (neurons, hidden)]
    stored = 3 * RANK * (hidden + neurons) + 2 * kept[0] * hidden + kept[1] * neurons
    return stored // (3 * hidden)


def requests(experts: int, hidden: int, neurons: int) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Options of a conversion, and of its method, by the name of the row."""
    smaller = min(hidden, neurons)
    share = max(1, round(RANK * smaller / SMALLER_SIDE))
    return {
        "whole": ({"experts": experts}, {}),
        "paper": ({"experts": experts}, {"compress": f"{RANK},{SPARSITY}"}),
        "low rank": ({"experts": experts}, {"compress": f"{RANK}"}),
        "paper's share": ({"experts": experts}, {"compress": f"{share},{SPARSITY}"}),
        "narrow": ({"experts": experts, "expert_width": equal_width(hidden, neurons)}, {}),
        "fewer": ({"experts": experts // 2}, {}),
    }


def measure(
    arguments: argparse.Namespace, config: dict[str, Any], options: dict[str, Any], method: dict[str, Any]
) -> dict[str, Any]:
    """Converts once, and returns what the report says."""
    with tempfile.TemporaryDirectory() as folder:
        report = convert(
            arguments.model,
            ConvertOptions(
                method=MethodOptions(preset="hc-refit", refit="none", **method),
                calibration=CalibrationOptions(
                    dataset=str(arguments.calibration), samples=SEQUENCES, sequence_length=LENGTH
                ),
                output=Path(folder) / "result",
                max_memory=1 << 62,
                **options,
            ),
        ).as_dict()
    width = options.get("expert_width", config["intermediate_size"])
    active = report["experts"]["per_token_after"]
    flops = 2 * active * 3 * config["hidden_size"] * width * len(report["layers"])
    compression = report.get("compression")
    found = {
        "output_error": fmean(layer["output_error"] for layer in report["layers"]),
        "perplexity_ratio": report["measured"]["overall"]["ratio"],
        "kl": report["measured"]["overall"]["kl"],
        "weights_bytes": report["weights_bytes"]["after"],
        "expert_flops_per_token": flops if compression is None else compression["expert_flops_per_token"]["after"],
        "seconds": report["timings_seconds"]["convert"],
    }
    if compression is not None:
        found["stable_rank"] = {
            when: fmean(
                rank for layer in report["layers"] for ranks in layer["stable_rank"][when].values() for rank in ranks
            )
            for when in ("before", "after")
        }
    return found


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rows", nargs="+", default=None)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    config = json.loads((arguments.model / "config.json").read_text())
    rows = requests(arguments.experts, config["hidden_size"], config["intermediate_size"])
    found = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    for name in arguments.rows or rows:
        options, method = rows[name]
        found[name] = {**options, **method, **measure(arguments, config, options, method)}
        print(name, json.dumps(found[name]), flush=True)
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
