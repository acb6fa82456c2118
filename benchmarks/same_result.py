"""Compares the folders of two conversions that should have made the same."""

import hashlib
import json
from pathlib import Path
from typing import Any

REPORT, CARD = "hcsmoe.json", "README.md"
# What a report records of the run itself; the line of the card that says the same, and the one with the card's digest.
OF_THE_RUN = ("timings_seconds", "peak_memory_bytes")
TRAINING_TIME = "seconds"
RUN_LINES = ("- **Run**:", "<!-- hcsmoe:card ")


def content(folder: Path) -> dict[str, str]:
    """Digests of all files of a result, by name; those of report and card leave out times and peaks of memory.

    Args:
        folder: The result; anything else that lies in it counts as well.
    """
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    return {str(path.relative_to(folder)): hashlib.sha256(_lasting(path)).hexdigest() for path in files}


def differences(first: Path, second: Path) -> list[str]:
    """Names of the files that differ, or that one of two results lacks."""
    one, other = content(first), content(second)
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _lasting(path: Path) -> bytes:
    """What a file should hold in every run."""
    if path.name == REPORT:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: value for name, value in report.items() if name not in OF_THE_RUN}
        if kept.get("refit_model"):
            kept["refit_model"].pop(TRAINING_TIME)
        return json.dumps(kept).encode()
    if path.name == CARD:
        lines = path.read_text(encoding="utf-8").splitlines()
        return "\n".join(line for line in lines if not line.startswith(RUN_LINES)).encode()
    return path.read_bytes()
