"""Recoveries that several processes share: the same training, one of them writes, and one of them prints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launched_ranks import PATIENCE_SECONDS, free_port, launched, outcome
from recovered import write_text
from tiny_models import differing, read_tensors

from hcsmoe_hub.result.verify import check_structure

STEPS = 8


def words(source: Path, output: str, batch_size: int, *others: object) -> list[object]:
    """A recovery of the result next to a model, in a folder next to both."""
    given = ["--teacher", source, "--data", write_text(source), "--output", source.parent / output]
    size = [
        "--batch-size",
        batch_size,
        "--max-steps",
        STEPS,
        "--evaluate-every",
        4,
        "--held-out",
        0.25,
        "--learning-rate",
        0.02,
    ]
    return ["recover", source.parent / "result", *given, *size, "--device", "cpu", "--dtype", "float32", *others]


def record(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "hcsmoe.json").read_text())["recovery"]
    return found


def command(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """What a fresh interpreter does with some arguments."""
    run = [sys.executable, "-P", "-m", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(run, capture_output=True, text=True, timeout=PATIENCE_SECONDS, env=environment, check=False)


def test_two_ranks_train_as_one_process_with_twice_the_batch(source):
    with launched(*words(source, "shared", 2, "--quiet")) as ranks:
        first, other = map(outcome, ranks)
    assert first == (0, f"{source.parent / 'shared'}\n", "")
    assert other == (0, "", "")
    alone = command("hcsmoe_hub.cli", *words(source, "alone", 4, "--quiet"))
    assert alone.returncode == 0, alone.stderr
    ours, theirs = (record(source.parent / name) for name in ("shared", "alone"))
    assert (ours["steps"], ours["tokens"], ours["settings"]) == (theirs["steps"], theirs["tokens"], theirs["settings"])
    for when in ("before", "after"):
        assert ours[when] == pytest.approx(theirs[when], rel=1e-3)
    check_structure(source.parent / "shared")


def test_accelerate_launches_a_recovery_with_logits_on_disk(source):
    logits = source.parent / "logits"
    launch = ["launch", "--cpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", free_port(), "-m", "hcsmoe_hub.cli"]
    done = command(
        "accelerate.commands.accelerate_cli",
        *launch,
        *words(source, "recovered", 2, "--teacher-logits", logits, "--top-logits", 8, "--json"),
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["output"] == str(source.parent / "recovered")
    assert document["recovery"]["settings"]["top_logits"] == 8
    assert document["recovery"] == record(source.parent / "recovered")
    assert sorted(path.name for path in logits.iterdir()) == ["hcsmoe-logits.json", "logits-00000.arrow"]
    changed = differing(read_tensors(source.parent / "recovered"), read_tensors(source.parent / "result"))
    assert len(changed) == document["recovery"]["trained_tensors"] > 0


def test_a_refusal_is_reported_by_one_rank(source):
    with launched(*words(source, "model", 2)) as ranks:
        outcomes = [outcome(rank) for rank in ranks]
    assert [code for code, *_ in outcomes] == [1, 1]
    errors = "".join(errors for *_, errors in outcomes)
    assert errors.count("Error:") == 1
    assert "is the teacher itself" in errors
