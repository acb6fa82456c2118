"""Starts the process in which disks fail, and asks it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faults.disk import environment

HERE = Path(__file__).parent


@contextmanager
def asking() -> Iterator[Callable[..., Any]]:
    """Gives a function that asks the process for something and returns its answer."""
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    variables = environment(PYTHONPATH=path.rstrip(os.pathsep), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    process = subprocess.Popen(
        [sys.executable, "-P", str(HERE / "worker.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=variables,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def read() -> Any:
        answer = json.loads(answers.readline() or '{"failure": "the process ended"}')
        assert "answer" in answer, answer["failure"]
        return answer["answer"]

    def request(do: str, **what: Any) -> Any:
        requests.write(json.dumps({"do": do, **what}) + "\n")
        requests.flush()
        return read()

    read()
    try:
        yield request
    finally:
        requests.close()
        process.wait()
