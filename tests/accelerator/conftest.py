"""A process with the pretended accelerator for every file of tests."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[..., Any]]:
    """Asks the process for something and returns its answer; torch takes the device for an accelerator only there."""
    from accelerator.pretended import missing_tool

    missing = missing_tool()
    if missing is not None:
        pytest.skip(f"the pretended accelerator is compiled, and this machine lacks {missing}")
    path = os.pathsep.join([str(WORKER.parent), str(WORKER.parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)}
    process = subprocess.Popen(
        [sys.executable, "-P", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def request(do: str, **what: Any) -> Any:
        requests.write(json.dumps({"do": do, **what}) + "\n")
        requests.flush()
        answer = json.loads(answers.readline() or '{"failure": "the process ended"}')
        assert "answer" in answer, answer["failure"]
        return answer["answer"]

    yield request
    requests.close()
    process.wait()
