"""Conversions that are killed: the same command ends in the same bytes as if nothing had happened.

``benchmarks/kills.py`` does the same with larger models at random moments.
"""

import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import ROOT, TESTS
from tiny_models import build, token_ids

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    same_result = importlib.import_module("same_result")

# Events at which the runs of one conversion end, one after another.
ENDS = (
    (),
    ("convert 0",),
    ("convert 1",),
    ("convert finished",),
    ("verify started",),
    ("convert 0", "convert 1", "verify finished"),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    np.save(folder / "ids.npy", token_ids().numpy())
    return build(folder / "model", num_hidden_layers=3)


def kill(source: Path, results: Path, preset: str, ends: Sequence[Sequence[str]]) -> list[list[list[str]]]:
    """The layers that each run of each conversion has converted."""
    words = [str(source), str(source.parent / "ids.npy"), str(results), preset]
    done = subprocess.run(
        [sys.executable, "-P", str(TESTS / "killed.py"), *words],
        input=json.dumps(ends),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[list[list[str]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(("preset", "ends"), [("hc-refit", ENDS), ("reap", ENDS[:2])])
def test_a_killed_conversion_ends_in_the_bytes_of_an_undisturbed_one(
    source: Path, tmp_path: Path, preset: str, ends: Sequence[Sequence[str]]
) -> None:
    runs = kill(source, tmp_path, preset, ends)
    undisturbed = same_result.content(tmp_path / "0" / "result")
    assert len([name for name in undisturbed if name.endswith(".safetensors")]) > 1
    for number, own in enumerate(ends[1:], 1):
        assert same_result.content(tmp_path / str(number) / "result") == undisturbed, f"killed at {own}"
    for before, after in chain.from_iterable(map(pairwise, runs)):
        # The layer that was the last one may not have been on the disk yet.
        assert set(before) & set(after) <= set(before[-1:]), f"{before}, then {after}"


def test_times_and_peaks_do_not_count_as_differences_but_anything_else_does(tmp_path: Path) -> None:
    report: dict[str, Any] = {"layers": [1, 2], "timings_seconds": {"convert": 1.5}, "refit_model": {"seconds": 3}}
    changes: dict[str, dict[str, Any]] = {
        "one": {},
        "same": {"timings_seconds": {"convert": 9.0}, "peak_memory_bytes": {"process": 1}},
        "other": {"layers": [2, 1]},
    }
    for name, changed in changes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "hcsmoe.json").write_text(json.dumps(report | changed))
        (tmp_path / name / "README.md").write_text(f"# Model\n- **Run**: {name}, 3 s\n")
    (tmp_path / "other" / "hcsmoe.incomplete").mkdir()
    (tmp_path / "other" / "hcsmoe.incomplete" / "lock").touch()
    assert same_result.differences(tmp_path / "one", tmp_path / "same") == []
    assert same_result.differences(tmp_path / "one", tmp_path / "other") == ["hcsmoe.incomplete/lock", "hcsmoe.json"]
