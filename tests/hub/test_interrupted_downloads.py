"""Downloads that are interrupted end at once, with Xet and without."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_client import Machine
from hub_server import Fault, Hub
from places import EXAMPLE, TESTS

from hub.folders import files_under

READER = TESTS / "hub" / "reader.py"
SECONDS = 60
SHARD_BYTES = sum(path.stat().st_size for path in EXAMPLE.glob("*.safetensors"))
WAYS = {
    "plain": (False, "1"),
    "xet": (False, "0"),
    "low-disk": (True, "1"),
}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as server:
        for name in WAYS:
            server.add(f"org/{name}", EXAMPLE).xet = True
        # So slow that everything would take the better part of a minute.
        server.slow_pieces, server.slow_seconds = 40, 0.3
        headers: set[str] = set()

        def faults(method: str, path: str) -> Fault | None:
            if method != "GET" or not is_body(path):
                return None
            if path in headers or path.startswith("/_xorbs/"):
                return Fault.SLOW
            # The first request for a shard is that for its header.
            headers.add(path)
            return None

        server.faults = faults
        yield server


def is_body(path: str) -> bool:
    return path.endswith(".safetensors") or path.startswith("/_xorbs/")


@pytest.mark.parametrize("name", WAYS)
def test_an_interrupted_download_ends_at_once(name: str, hub: Hub, tmp_path: Path) -> None:
    low_disk, no_xet = WAYS[name]
    first = len(hub.requests)
    process = subprocess.Popen(
        [sys.executable, str(READER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=Machine(tmp_path).environment(hub.url, HF_HUB_DISABLE_XET=no_xet),
        cwd=tmp_path,
        text=True,
    )
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write(json.dumps({"it": {"source": f"org/{name}", "low_disk": low_disk}}))
    process.stdin.close()
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and not any(
        is_body(request.path) and request.range != "bytes=0-99999" and request.sent > 100_000
        for request in hub.requests[first:]
    ):
        time.sleep(0.01)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    errors = process.stderr.read()
    process.wait(timeout=SECONDS)
    assert time.monotonic() - begun < 10
    assert errors.count("KeyboardInterrupt") == 1, errors
    assert "Fatal" not in errors
    # Pieces stay for the next run; of a shard that is not whole, the client could not use anything.
    left = [path for path in files_under(tmp_path) if path.suffix == ".incomplete" or path.parents[1].name == "hcsmoe"]
    if low_disk:
        assert 10_000 < sum(path.stat().st_size for path in left) < SHARD_BYTES
    else:
        assert left == []
