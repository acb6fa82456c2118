"""Somebody else's files: what is broken or hostile is refused in a few lines, within a bounded memory."""

import json
import subprocess
import sys
from pathlib import Path

from hostile.hostile_inputs import all_inputs

# All of them take minutes: ``python tests/hostile/hostile_inputs.py``.
PART = "3/12"


def test_there_are_more_than_three_hundred_different_inputs() -> None:
    names = [hostile.name for hostile in all_inputs()]
    assert len(set(names)) == len(names) >= 300


def test_hostile_inputs_are_refused_cleanly_and_touch_nothing_else() -> None:
    command = [sys.executable, str(Path(__file__).parent / "hostile_inputs.py"), "--part", PART]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    outcomes = [json.loads(line) for line in printed.stdout.splitlines()]
    assert len(outcomes) >= 25, printed.stderr
    assert [outcome for outcome in outcomes if not outcome["clean"]] == []
