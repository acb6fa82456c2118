"""The same bytes from every run: with other hash seeds, threads, time zones and micro-batches."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from places import ROOT, TESTS
from tiny_models import build, token_ids

from hcsmoe_hub.methods.totals import root_mean_square, total
from hcsmoe_hub.options import Preset

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    same_result = importlib.import_module("same_result")

# Large enough that products and sums are shared by threads.
SIZES = {"hidden_size": 256, "intermediate_size": 352}
SEQUENCES, LENGTH = 8, 64
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
TWO_THREADS = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "PYTHONHASHSEED": "2", "TZ": "Pacific/Auckland"}
# Threads that spin while they wait slow each other down where tests share two cores.
TWO_THREADS["OMP_WAIT_POLICY"] = "PASSIVE"


def converted(source: Path, name: str, environment: Mapping[str, str], *words: str) -> Path:
    """A folder with the results of all presets, from a process of its own."""
    folder = source.parent / name
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            str(TESTS / "converted.py"),
            str(source),
            str(source.parent / "ids.npy"),
            str(folder),
            *words,
        ],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("determinism")
    np.save(folder / "ids.npy", token_ids(SEQUENCES, LENGTH).numpy())
    return build(folder / "model", max_shard_size="4MB", **SIZES)


@pytest.fixture(scope="module")
def first(source: Path) -> Path:
    return converted(source, "first", ONE_THREAD)


def test_two_threads_and_another_hash_seed_make_the_same_bytes(source: Path, first: Path) -> None:
    second = converted(source, "second", TWO_THREADS)
    found = {preset: same_result.differences(first / preset, second / preset) for preset in Preset}
    assert found == {preset: [] for preset in Preset}


def test_micro_batches_of_any_size_make_the_same_weights_and_clusters(source: Path, first: Path) -> None:
    second = converted(source, "batches", ONE_THREAD, str(3 * LENGTH))
    for preset in Preset:
        files = same_result.differences(first / preset, second / preset)
        # Figures of the report, sums in float64, may differ in the last of 16 digits.
        assert set(files) <= {"result/hcsmoe.json"}
        reports = [json.loads((folder / preset / "result" / "hcsmoe.json").read_text()) for folder in (first, second)]
        for before, after in zip(*(report["layers"] for report in reports), strict=True):
            assert after["labels"] == before["labels"]
            assert after["saliency"] == pytest.approx(before["saliency"], rel=1e-12)


def test_the_order_of_files_in_a_folder_does_not_matter(source: Path, first: Path) -> None:
    turned = source.parent / "turned" / "model"
    turned.mkdir(parents=True)
    for file in sorted(source.iterdir(), reverse=True):
        shutil.copy(file, turned)
    shutil.copy(source.parent / "ids.npy", turned.parent)
    second = converted(turned, "result", ONE_THREAD)
    assert same_result.differences(first / Preset.REAP, second / Preset.REAP) == []


@pytest.mark.parametrize("shape", [(100_000,), (300, 700), (5, 40, 600), ()])
def test_totals_do_not_depend_on_the_number_of_threads(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((total(values), root_mean_square(values), total(values, dtype=torch.float64)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    torch.testing.assert_close(found[0][2], values.sum(dtype=torch.float64))
    torch.testing.assert_close(found[0][1], values.square().mean().sqrt())
