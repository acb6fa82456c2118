"""Two conversions of one repository with one cache at the same time, on a file system where locks do not hold."""

import hashlib
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hub_server import Fault, Hub

from hub.faults import Plan
from hub.journey import Journey, make_hub

NO_LOCKS = Path(__file__).with_name("no_locks.cpp")
COUNTS = ("4", "6")
WAYS: Mapping[str, Sequence[str]] = {"whole shards": (), "--low-disk": ("--low-disk",)}
SHA256_DIGITS = 64
# A busy machine starts a process slowly.
MAX_SECONDS = 120.0
Weights = Mapping[str, Mapping[str, bytes]]


def build_no_locks(folder: Path) -> Path:
    """A library for ``LD_PRELOAD`` with which ``flock`` succeeds for everybody."""
    library = folder / "no_locks.so"
    subprocess.run([os.environ.get("CXX", "c++"), "-shared", "-fPIC", "-o", library, NO_LOCKS], check=True)
    return library


def convert_alone(folder: Path) -> Weights:
    """The weights that each conversion writes by itself, by its number of experts."""
    found = {}
    with make_hub() as hub:
        journey = Journey.prepare(folder, hub)
        for count in COUNTS:
            done = journey.run(None, "--experts", count, "--output", count)
            if done.returncode:
                raise SystemExit(done.stderr)
            found[count] = journey.machine.weights(count)
    return found


def convert_together(folder: Path, expected: Weights, words: Sequence[str], no_locks: Path) -> list[str]:
    """Runs both conversions at the same time.

    Args:
        folder: A new folder for the machine that both run on.
        expected: What each writes by itself.
        words: More words of both commands.
        no_locks: The library of ``build_no_locks``.

    Returns:
        What is wrong; empty if all is well.
    """
    with make_hub() as hub:
        journey = Journey.prepare(folder, hub)
        hub.faults = _slow_once_both_have_begun(hub)
        hub.slow_pieces, hub.slow_seconds = 8, 0.03
        running = {
            count: journey.start(None, "--experts", count, "--output", count, *words, LD_PRELOAD=str(no_locks))
            for count in COUNTS
        }
        ended = {count: (process.communicate()[1], process.returncode) for count, process in running.items()}
        problems = [f"{count} experts: {errors}" for count, (errors, code) in ended.items() if code]
        for count in COUNTS:
            if journey.machine.weights(count) != expected[count]:
                problems.append(f"{count} experts: other weights than alone")
        return [*problems, *_damaged(journey.machine.folder)]


def _damaged(folder: Path) -> Iterator[str]:
    """Files of the cache that are not what their names say."""
    for blob in folder.glob("home/hub/*/blobs/*"):
        if len(blob.name) == SHA256_DIGITS and hashlib.sha256(blob.read_bytes()).hexdigest() != blob.name:
            yield f"{blob.name} in the cache has another content"
    for left in folder.glob("home/hub/*/hcsmoe/*"):
        yield f"{left.name} is left in the cache"


def _slow_once_both_have_begun(hub: Hub) -> Plan:
    """Sends shards slowly, and none before every conversion has asked for their sizes."""

    def faults(method: str, path: str) -> Fault | None:
        if not path.endswith(".safetensors"):
            return None
        deadline = time.monotonic() + MAX_SECONDS
        while time.monotonic() < deadline:
            if sum("/paths-info/" in request.path for request in hub.requests) >= len(COUNTS):
                break
            time.sleep(0.01)
        return Fault.SLOW

    return faults
