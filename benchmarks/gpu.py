"""What a conversion does on a GPU: whether it gives the host's results, how fast it is, and what limits it.

Run: python benchmarks/gpu.py [--out FOLDER] [--models FOLDER] [--budget 480] [--only ceilings,correct,mixtral,qwen3]
     python benchmarks/gpu.py --device cpu --tiny       a dry run without a GPU

It needs 20 GB of disk and 35 GB of memory on the GPU, no network, and no checkpoint: it draws its own. Every finding is
printed and written to ``gpu_check.json`` at once, next to the tables of torch's profiler; what does not fit into the
budget of seconds is skipped and named. Exit code 1 means that a part failed or a result differs from the host's.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Read by the libraries when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from gpu_ceilings import measure_ceilings
from gpu_correctness import check_correctness
from gpu_layers import check_mixtral, check_qwen
from gpu_run import Run

from hcsmoe_hub.machine.device import resolve_device

# About what each part takes at least.
PARTS = {
    "ceilings": (measure_ceilings, 20.0),
    "correct": (check_correctness, 30.0),
    "mixtral": (check_mixtral, 60.0),
    "qwen3": (check_qwen, 40.0),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: a dry run of this script")
    parser.add_argument("--models", type=Path, help="folder with trained tiny models, such as example-mixtral")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the results")
    parser.add_argument("--scratch", type=Path, help="disk for synthetic checkpoints")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds")
    parser.add_argument("--only", default=",".join(PARTS))
    wanted = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="gpu-", dir=wanted.scratch))
    run = Run(
        device=resolve_device(wanted.device),
        is_tiny=wanted.tiny,
        budget=wanted.budget,
        out=wanted.out,
        scratch=scratch,
        models=wanted.models,
    )
    try:
        for name in wanted.only.split(","):
            work, seconds = PARTS[name]
            run.part(name, seconds, lambda work=work: work(run))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    wrong = [name for name, row in run.found.get("correct", {}).items() if row["verdict"] != "ok"]
    failed = list(run.found["failed"])
    run.say(f"skipped: {run.found['skipped'] or 'nothing'}; failed: {failed or 'nothing'}; not as on the host: {wrong}")
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
