"""Ranks of a command, each a process of its own, as a launcher starts them."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Importing torch on a busy machine, and meeting the other ranks.
PATIENCE_SECONDS = 240

Processes = list["subprocess.Popen[str]"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def launched(*words: object) -> Iterator[Processes]:
    """Two ranks of a command, in the environment that launchers make."""
    port, started = free_port(), list[subprocess.Popen[str]]()
    for rank in range(2):
        environment = os.environ | {
            "WORLD_SIZE": "2",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, "-P", "-m", "hcsmoe_hub.cli", *map(str, words)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def outcome(process: "subprocess.Popen[str]", patience: float = PATIENCE_SECONDS) -> tuple[int, str, str]:
    """Exit code, and what was printed on stdout and stderr."""
    printed, errors = process.communicate(timeout=patience)
    return process.returncode, printed, errors
