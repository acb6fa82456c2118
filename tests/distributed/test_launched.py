"""Ranks that a launcher has started: who prints, and what happens if one of them dies."""

import time
from pathlib import Path

import numpy as np
import pytest
from launched_ranks import PATIENCE_SECONDS, launched, outcome
from places import ROOT
from tiny_models import token_ids

EXAMPLE = ROOT / "examples" / "tiny-mixtral"
# Longest time in which the others notice that a rank has died.
NOTICE_SECONDS = 30


def wait_for(place: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not place.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def long_conversion(result: Path) -> list[object]:
    """A command that takes longer than anybody waits."""
    ids = result.with_suffix(".npy")
    np.save(ids, token_ids(2000, 128).numpy())
    return ["convert", EXAMPLE, "--experts", 4, "--device", "cpu", "--calibration", ids, "--output", result]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_with_one_message(tmp_path: Path, killed: int) -> None:
    result = tmp_path / "result"
    with launched(*long_conversion(result)) as ranks:
        wait_for(result / "hcsmoe.incomplete")
        ranks[killed].kill()
        start = time.monotonic()
        code, printed, errors = outcome(ranks[1 - killed])
        assert time.monotonic() - start < NOTICE_SECONDS
    assert code == 1
    assert errors.count("Error:") == 1
    assert "Traceback" not in errors
    assert printed == ""
    # What is left does not stop the next conversion.
    left = {file.name for file in result.iterdir()} if result.exists() else set()
    assert not left or "hcsmoe.incomplete" in left


def test_only_the_first_rank_prints(tmp_path: Path) -> None:
    result = tmp_path / "result"
    ids = tmp_path / "ids.npy"
    np.save(ids, token_ids(4, 16).numpy())
    words = ["convert", EXAMPLE, "--experts", 4, "--preset", "reap", "--device", "cpu", "--calibration", ids]
    with launched(*words, "--output", result) as ranks:
        (first, printed, _), other = map(outcome, ranks)
    assert first == 0
    assert str(result) in printed
    assert other == (0, "", "")
    assert (result / "hcsmoe.json").is_file()


def test_a_refusal_of_all_ranks_is_printed_once(tmp_path: Path) -> None:
    words = ["convert", EXAMPLE, "--experts", 40, "--output", tmp_path / "result"]
    with launched(*words) as ranks:
        found = [outcome(rank) for rank in ranks]
    assert [code for code, _, _ in found] == [1, 1]
    assert "".join(errors for _, _, errors in found).count("Error:") == 1


def test_commands_that_need_one_process_run_on_the_first_rank_or_refuse(tmp_path: Path) -> None:
    with launched("architectures") as ranks:
        (first, printed, _), other = map(outcome, ranks)
    assert first == 0
    assert "mixtral" in printed
    assert other == (0, "", "")
    with launched("evaluate", EXAMPLE) as ranks:
        (first, _, errors), other = map(outcome, ranks)
    assert first == 1
    assert "'hcsmoe evaluate' runs in a single process, but 2 were started." in errors
    assert other == (1, "", "")
