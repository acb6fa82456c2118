"""Converts models again and again under other circumstances, and compares the results with the first one.

Run: python benchmarks/determinism.py [--models example sharded] [--presets hc-refit hc-smoe m-smoe reap] [--json FILE]

Every conversion is a process of its own. Circumstances are the number of threads, the size of micro-batches, the seed
of Python's hashes, locale and time zone. Reported is which files differ; where weights do, by how much at most, as a
share of the norm of the tensor, and whether the same experts were merged.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fresh_process import machine
from kills import LENGTH, Case, cases
from safetensors.torch import load_file
from same_result import REPORT, differences
from torch import Tensor
from watched_run import ONE_THREAD, OUTPUT, convert

PRESETS = ("hc-refit", "hc-smoe", "m-smoe", "reap")


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """Under which a conversion runs.

    Attributes:
        environment: Variables that are set.
        words: Further arguments.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()


CIRCUMSTANCES = {
    "again": Circumstances(),
    "two threads": Circumstances(environment={"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}),
    "hash seed, locale, time zone": Circumstances(
        environment={"PYTHONHASHSEED": "7", "LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "TZ": "Pacific/Auckland"}
    ),
    "small micro-batches": Circumstances(words=("--batch-tokens", str(LENGTH))),
}


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a result, by name."""
    return {name: value for shard in sorted(folder.glob("*.safetensors")) for name, value in load_file(shard).items()}


def compare(first: Path, second: Path) -> dict[str, Any]:
    """What differs between two results."""
    files = differences(first, second)
    found: dict[str, Any] = {"is_identical": not files, "differs": files}
    if any(name.endswith(".safetensors") for name in files):
        before, after = weights(first), weights(second)
        shares = {
            name: float((after[name].float() - value.float()).norm() / value.float().norm().clamp(min=1e-30))
            for name, value in before.items()
            if after[name].shape == value.shape
        }
        reports = (json.loads((folder / REPORT).read_text()) for folder in (first, second))
        labels = [[layer["labels"] for layer in report["layers"]] for report in reports]
        found |= {
            "tensors_that_differ": sum(share > 0 for share in shares.values()),
            "largest_share": max(shares.values()),
            "has_same_clusters": labels[0] == labels[1],
        }
    return found


def run(case: Case, preset: str, name: str, circumstances: Circumstances) -> Path:
    """Converts a case; returns the result."""
    folder = case.fresh(name)
    words = [*case.words, "--preset", preset, *circumstances.words]
    environment = {"PYTHONHASHSEED": "0", **ONE_THREAD, **circumstances.environment}
    done = convert(folder, words, environment=environment)
    if done.status:
        raise SystemExit(f"{case.name}, {preset}, {name}: {done.messages}")
    return folder / OUTPUT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("example", "sharded"), default=["example", "sharded"])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--circumstances", nargs="+", choices=list(CIRCUMSTANCES), default=list(CIRCUMSTANCES))
    parser.add_argument("--json", type=Path, help="file of the outcome")
    asked = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "models": {}}
    with tempfile.TemporaryDirectory() as place:
        for case in cases(asked.models, Path(place)):
            for preset in asked.presets:
                first = run(case, preset, "first", Circumstances())
                for name in asked.circumstances:
                    outcome = compare(first, run(case, preset, "other", CIRCUMSTANCES[name]))
                    found["models"].setdefault(case.name, {}).setdefault(preset, {})[name] = outcome
                    print(case.name, preset, name, json.dumps(outcome), flush=True)
                    if asked.json:
                        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
