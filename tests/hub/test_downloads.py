"""Weights downloaded while they are read: each byte once, resumed, and deleted with ``low_disk``."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hub_client import Answers, Call, Machine
from hub_server import Fault, Hub, RandomFaults, Request
from places import EXAMPLE, TESTS

from hcsmoe_hub.checkpoint.source import LocalSource
from hub.folders import files_under
from hub.reader import BLOCK_BYTES, read_all, steps_of

READER = TESTS / "hub" / "reader.py"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SIZES = {shard: (EXAMPLE / shard).stat().st_size for shard in SHARDS}
SOURCE = LocalSource(EXAMPLE)
STEP_BYTES = [sum(tensor.nbytes for tensor in step) for step in steps_of(SOURCE)]
# The shards of the largest two steps in a row are both; their own bytes are fewer.
PAIR_BYTES = max(map(sum, pairwise(STEP_BYTES)))
SECONDS = 60
MODES = {"low": True, "normal": False}


class Disk:
    """Polls how much disk the weights of repositories take in a cache."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.most: dict[str, int] = {}

    def look(self, repository: str) -> int:
        total = 0
        for path in files_under(self.cache / f"models--org--{repository}"):
            if path.suffix != ".sums" and (".safetensors." in path.name or path.parent.name == "blobs"):
                with suppress(FileNotFoundError):
                    size = path.stat().st_size
                    total += size if size > 300_000 or "hcsmoe" in path.parts else 0
        self.most[repository] = max(self.most.get(repository, 0), total)
        return total

    @contextmanager
    def watched(self, *repositories: str) -> Iterator[None]:
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.002):
                for repository in repositories:
                    self.look(repository)

        thread = threading.Thread(target=watch)
        thread.start()
        yield
        stop.set()
        thread.join()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as server:
        names = ("low", "normal", "mixed", "killed-low", "killed-normal", "left", "bad-low", "bad-normal", "later")
        for name in (*names, "twice", "interrupted-low", "interrupted-normal"):
            server.add(f"org/{name}", EXAMPLE)
        server.slow_pieces, server.slow_seconds = 40, 0.02
        kinds = (Fault.CUT_ANSWER, Fault.LOST_ANSWER, Fault.TOO_MANY_REQUESTS, Fault.UNAVAILABLE)
        server.faults = in_bodies(RandomFaults(2, rate=0.5, kinds=kinds, most=4, where="^/org/bad-"))
        yield server


def in_bodies(plan: Callable[[str, str], Fault | None]) -> Callable[[str, str], Fault | None]:
    """A plan for the bodies of shards alone: where the first request for one, that for the header, fails, the client
    pauses for a second and more."""
    seen: set[str] = set()

    def faults(method: str, path: str) -> Fault | None:
        if method == "GET" and path in seen:
            return plan(method, path)
        if method == "GET" and path.endswith(".safetensors"):
            seen.add(path)
        return None

    return faults


@contextmanager
def slow(hub: Hub, repository: str, seconds: float) -> Iterator[None]:
    """Lets the bodies of a repository come in pieces, with a pause after each."""
    sound, hub.slow_seconds = hub.faults, seconds
    hub.faults = in_bodies(lambda method, path: Fault.SLOW if path.startswith(f"/org/{repository}") else None)
    yield
    hub.faults = sound


def bodies(requests: list[Request], repository: str) -> dict[str, list[tuple[int, int]]]:
    """Where the answers to requests for the bodies of shards began, and how many bytes of each were sent.

    The client asks for whole shards, and for the rest of one that broke off."""
    found: dict[str, list[tuple[int, int]]] = {shard: [] for shard in SHARDS}
    for request in requests:
        name = request.path.rpartition("/")[2]
        is_body = request.method == "GET" and request.path.startswith(f"/org/{repository}/") and name in SHARDS
        if is_body and request.status in (200, 206) and request.range != "bytes=0-99999":
            start = (request.range or "bytes=0-")[6:].partition("-")[0]
            found[name].append((int(start), request.sent))
    return found


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("machine"))


@pytest.fixture(scope="module")
def cache(machine: Machine) -> Path:
    return machine.folder / "home" / "hub"


@pytest.fixture(scope="module")
def disk(cache: Path) -> Disk:
    return Disk(cache)


@pytest.fixture(scope="module")
def expected() -> Mapping[str, object]:
    return {**read_all(SOURCE), "fetched": list(SHARDS)}


def call(name: str, *, low_disk: bool = False) -> Call:
    return {"source": f"org/{name}", "low_disk": low_disk}


def start(machine: Machine, hub: Hub, calls: Mapping[str, Call]) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, str(READER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=machine.environment(hub.url),
        cwd=machine.folder,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(calls))
    process.stdin.close()
    return process


def wait_until(hub: Hub, *repositories: str, sent: int) -> None:
    """Waits until a body of each has been sent in part."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        found = [bodies(hub.requests, name) for name in repositories]
        if all(any(size > sent for parts in each.values() for _, size in parts) for each in found):
            return
        time.sleep(0.005)
    raise AssertionError(f"no body of {repositories} was sent")


@pytest.fixture(scope="module")
def killed(hub: Hub, machine: Machine, disk: Disk) -> dict[str, int]:
    """Two downloads killed in the middle: the bytes that they leave."""
    calls = {name: call(f"killed-{name}", low_disk=low_disk) for name, low_disk in MODES.items()}
    # Slow enough for both to be at their first bodies.
    with slow(hub, "killed", 0.1):
        process = start(machine, hub, calls)
        wait_until(hub, "killed-low", "killed-normal", sent=200_000)
        process.send_signal(signal.SIGKILL)
        process.wait()
    return {name: disk.look(f"killed-{name}") for name in MODES}


@pytest.fixture(scope="module")
def snapshot(hub: Hub, machine: Machine) -> Path:
    """One shard in the user's own cache."""
    calls: Call = {"snapshot": True, "source": "org/mixed", "allow_patterns": [SHARDS[0]]}
    return Path(machine.run(hub.url, {"it": calls}, (READER,))["it"])


@pytest.fixture(scope="module")
def before(snapshot: Path) -> tuple[int, int]:
    """Which file the cached shard is, and since when."""
    found = (snapshot / SHARDS[0]).stat()
    return found.st_ino, found.st_mtime_ns


@pytest.fixture(scope="module")
def first(hub: Hub, machine: Machine, killed: dict[str, int]) -> int:
    """Number of requests before the run."""
    return len(hub.requests)


@pytest.fixture(scope="module")
def answers(hub: Hub, machine: Machine, cache: Path, disk: Disk, before: tuple[int, int], first: int) -> Answers:
    left = cache / "models--org--left" / "hcsmoe" / "0123.4567.left"
    left.mkdir(parents=True)
    (left / f"{SHARDS[0]}.0-10").write_bytes(bytes(10))
    calls = {
        "low": call("low", low_disk=True),
        "normal": call("normal"),
        "later": {**call("later"), "ahead": False},
        "mixed": call("mixed", low_disk=True),
        "left": call("left", low_disk=True),
        "twice a": call("twice", low_disk=True),
        "twice b": call("twice", low_disk=True),
    }
    calls |= {
        f"{kind} {name}": call(f"{kind}-{name}", low_disk=mode)
        for kind in ("killed", "bad")
        for name, mode in MODES.items()
    }
    with disk.watched("low"):
        return machine.run(hub.url, calls, (READER,))


def leftovers(cache: Path, repository: str) -> list[Path]:
    return list((cache / f"models--org--{repository}").glob("hcsmoe*"))


@pytest.mark.parametrize(
    "name",
    ["low", "normal", "later", "left", "twice a", "twice b", "bad low", "bad normal", "killed low", "killed normal"],
)
def test_what_is_read_is_what_the_repository_holds(name: str, answers: Answers, expected: Mapping[str, object]) -> None:
    assert answers[name]["digest"] == expected["digest"]
    assert sorted(answers[name]["fetched"]) == expected["fetched"]


def test_each_shard_is_sent_once(hub: Hub, answers: Answers) -> None:
    once = {shard: [(0, size)] for shard, size in SIZES.items()}
    assert bodies(hub.requests, "normal") == bodies(hub.requests, "later") == once


def test_each_byte_of_a_tensor_is_sent_once_on_low_disk(hub: Hub, answers: Answers) -> None:
    sent = bodies(hub.requests, "low")
    for shard, parts in sent.items():
        tensors = [tensor for tensor in SOURCE.tensors.values() if tensor.shard == shard]
        ends = sorted((start, start + size) for start, size in parts)
        assert all(end <= start for (_, end), (start, _) in pairwise(ends))
        assert sum(size for _, size in parts) == sum(tensor.nbytes for tensor in tensors)


def test_the_disk_holds_two_layers_at_most(answers: Answers, disk: Disk) -> None:
    assert max(STEP_BYTES) // 2 < disk.most["low"] <= PAIR_BYTES < sum(SIZES.values()) // 2


@pytest.mark.parametrize("name", ["low", "left", "twice", "mixed", "bad-low", "killed-low"])
def test_nothing_is_left_of_what_was_read(name: str, answers: Answers, cache: Path) -> None:
    assert leftovers(cache, name) == []
    kept = {path.name for path in (cache / f"models--org--{name}" / "snapshots").rglob("*.safetensors")}
    assert kept == ({SHARDS[0]} if name == "mixed" else set())


@pytest.mark.parametrize("name", ["normal", "later", "bad-normal", "killed-normal"])
def test_the_cache_keeps_whole_shards_otherwise(name: str, answers: Answers, cache: Path) -> None:
    assert leftovers(cache, name) == []
    (snapshot,) = (cache / f"models--org--{name}" / "snapshots").iterdir()
    assert [(snapshot / shard).read_bytes() for shard in SHARDS] == [(EXAMPLE / shard).read_bytes() for shard in SHARDS]
    assert sorted(path.stat().st_size for path in (snapshot.parents[1] / "blobs").iterdir())[-2:] == sorted(
        SIZES.values()
    )


def test_a_shard_of_the_users_cache_is_read_there_and_stays(
    hub: Hub, answers: Answers, expected: Mapping[str, object], snapshot: Path, before: tuple[int, int], first: int
) -> None:
    assert answers["mixed"] == {"digest": expected["digest"], "fetched": [SHARDS[1]]}
    assert bodies(hub.requests[first:], "mixed")[SHARDS[0]] == []
    found = (snapshot / SHARDS[0]).stat()
    assert (found.st_ino, found.st_mtime_ns) == before


def test_a_killed_download_is_resumed_on_low_disk(
    hub: Hub, killed: dict[str, int], answers: Answers, first: int
) -> None:
    assert 100_000 < killed["low"] < sum(SIZES.values())
    parts = [part for found in bodies(hub.requests[first:], "killed-low").values() for part in found]
    missing = sum(STEP_BYTES) - killed["low"]
    # The last block of a piece has no hash yet.
    assert missing <= sum(size for _, size in parts) <= missing + len(parts) * BLOCK_BYTES


def test_a_killed_download_of_a_whole_shard_begins_again(
    hub: Hub, killed: dict[str, int], answers: Answers, first: int
) -> None:
    # The client writes blocks of 10 MiB.
    assert killed["normal"] == 0
    once = {shard: [(0, size)] for shard, size in SIZES.items()}
    assert bodies(hub.requests[first:], "killed-normal") == once


@pytest.mark.parametrize("name", MODES)
def test_a_body_that_breaks_off_is_requested_again(name: str, hub: Hub, answers: Answers) -> None:
    faults = [request.fault for request in hub.requests if request.path.startswith(f"/org/bad-{name}/")]
    assert Fault.CUT_ANSWER in faults
    sent = sum(size for parts in bodies(hub.requests, f"bad-{name}").values() for _, size in parts)
    if MODES[name]:
        assert sent == sum(STEP_BYTES)
    else:
        # The client keeps what arrived in blocks of 10 MiB.
        assert sent >= sum(SIZES.values())
