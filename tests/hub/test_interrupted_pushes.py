"""Pushes that are killed, and pushes over a bad connection: what is visible meanwhile, and what is resent."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_client import PUSHER, WRITER, Call, Machine
from hub_server import Account, Fault, Hub, RandomFaults

from hub.folders import SHARD_BYTES, SHARDS, read_folder, write_folder

PUSHES = 12
DEADLINE_SECONDS = 60
PUT = re.compile(r"/_lfs/models/(?P<repo>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})/")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(tokens={WRITER: Account(name="me", role="write")}) as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder") / "result")


def publish(folder: Path, repo_id: str) -> Call:
    return {"action": "publish", "folder": str(folder), "repo_id": repo_id, "token": WRITER}


def visible(hub: Hub, repo_id: str) -> dict[str, bytes]:
    """The visible files of a repository, without those of the Hub."""
    if ("models", repo_id) not in hub.repositories:
        return {}
    contents = hub.model(repo_id).contents()
    return {name: content for name, content in contents.items() if name != ".gitattributes"}


def complete_shards(hub: Hub) -> Counter[tuple[str, str]]:
    """How often each shard arrived as a whole, by repository and content."""
    bodies = [request for request in hub.requests if request.method == "PUT" and request.received == SHARD_BYTES]
    matches = [PUT.match(request.path) for request in bodies if request.status == 200]
    return Counter((match["repo"], match["oid"]) for match in matches if match)


def start(machine: Machine, hub: Hub, call: Call) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, str(PUSHER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=machine.environment(hub.url),
        cwd=machine.folder,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps({"it": call}))
    process.stdin.close()
    process.stdin = None
    return process


class HoldOne:
    """Holds one of the requests that match, counted from 0."""

    def __init__(self, method: str, pattern: str, number: int) -> None:
        self._method, self._pattern, self._left = method, pattern, number

    def __call__(self, method: str, path: str) -> Fault | None:
        if method != self._method or not re.search(self._pattern, path):
            return None
        self._left -= 1
        return Fault.HELD if self._left == -1 else None


@pytest.mark.parametrize(
    ("method", "pattern", "number", "arrived"),
    [
        pytest.param("POST", "/api/repos/create", 0, 0, id="creation"),
        pytest.param("PUT", "/_lfs/", 0, 0, id="first shard"),
        pytest.param("PUT", "/_lfs/", 2, 2, id="third shard"),
        pytest.param("POST", "/commit/main", 0, 3, id="commit"),
    ],
)
def test_a_push_that_is_killed_publishes_nothing_and_the_next_one_resumes_it(
    method: str, pattern: str, number: int, arrived: int, hub: Hub, folder: Path, tmp_path: Path
) -> None:
    machine, call = Machine(tmp_path), publish(folder, "me/killed")
    hub.faults = HoldOne(method, pattern, number)
    process = start(machine, hub, call)
    assert hub.held.wait(DEADLINE_SECONDS)
    process.kill()
    process.communicate()
    hub.released.set()
    assert visible(hub, "me/killed") == {}
    assert len(complete_shards(hub)) == arrived
    answer = machine.run(hub.url, {"it": call}, (PUSHER,))["it"]
    assert answer["changed"] is True
    assert answer["bytes_sent"] == sum(map(len, read_folder(folder).values())) - arrived * SHARD_BYTES
    assert visible(hub, "me/killed") == read_folder(folder)
    assert list(complete_shards(hub).values()) == [1] * len(SHARDS)


@pytest.mark.parametrize("seed", [0])
def test_pushes_over_a_bad_connection_are_right(seed: int, hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.faults = faults = RandomFaults(seed, rate=0.12)
    calls = {f"me/run-{number}": publish(folder, f"me/run-{number}") for number in range(PUSHES)}
    answers = Machine(tmp_path).run(hub.url, calls, (PUSHER,))
    expected = read_folder(folder)
    # A request fails at most twice, which the client survives.
    assert {repo_id: answer for repo_id, answer in answers.items() if "refused" in answer} == {}
    assert [repo_id for repo_id in answers if visible(hub, repo_id) != expected] == []
    assert {len(hub.model(repo_id).commits) for repo_id in answers} == {2}
    assert faults.count() > PUSHES


@pytest.mark.parametrize("fault", [Fault.CUT_REQUEST, Fault.SERVER_ERROR], ids=lambda fault: fault.name)
def test_a_commit_that_keeps_failing_is_an_error(fault: Fault, hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.faults = RandomFaults(0, rate=1, kinds=[fault], most=100, where="/commit/")
    answer = Machine(tmp_path).run(hub.url, {"it": publish(folder, "me/never")}, (PUSHER,))["it"]
    assert (
        "during the push to me/never" in answer["message"]
        or "temporarily unable to accept me/never: 500" in answer["message"]
    )
    assert "run the same command again" in answer["hint"]
    assert visible(hub, "me/never") == {}


def step(action: str, folder: Path, repo_id: str = "me/kept") -> Call:
    return {**publish(folder, repo_id), "action": action}


def run(machine: Machine, hub: Hub, call: Call) -> Any:
    return machine.run(hub.url, {"it": call}, (PUSHER,))["it"]


@pytest.mark.parametrize("sent", range(len(SHARDS) + 1))
def test_shards_that_were_sent_and_deleted_are_committed_by_another_process(
    sent: int, hub: Hub, folder: Path, tmp_path: Path
) -> None:
    machine, here = Machine(tmp_path), tmp_path / "result"
    shutil.copytree(folder, here)
    rest = tmp_path / "rest"
    rest.mkdir()
    for name in sorted(SHARDS)[sent:]:
        (here / name).rename(rest / name)
    assert run(machine, hub, step("send", here)) is None
    assert visible(hub, "me/kept") == {}
    # What this process has not sent, the next one has in its folder.
    for path in rest.iterdir():
        path.rename(here / path.name)
    answer = run(machine, hub, step("finish", here))
    assert visible(hub, "me/kept") == read_folder(folder)
    assert list(complete_shards(hub).values()) == [1] * len(SHARDS)
    assert answer["bytes_sent"] == sum(map(len, read_folder(folder).values())) - sent * SHARD_BYTES


def test_a_second_commit_of_what_was_sent_changes_nothing(hub: Hub, folder: Path, tmp_path: Path) -> None:
    machine, here = Machine(tmp_path), tmp_path / "result"
    shutil.copytree(folder, here)
    call = {**step("finish", here), "overwrite": True}
    run(machine, hub, step("send", here))
    assert [run(machine, hub, call)["changed"] for _ in range(2)] == [True, False]
    assert len(hub.model("me/kept").commits) == 2


@pytest.mark.parametrize("when", ["before the run", "before the commit"])
def test_a_shard_that_the_hub_has_lost_is_reported_and_nothing_is_committed(
    when: str, hub: Hub, folder: Path, tmp_path: Path
) -> None:
    machine, here = Machine(tmp_path), tmp_path / "result"
    shutil.copytree(folder, here)
    run(machine, hub, step("send", here))
    held = hub.model("me/kept").objects
    lost = hashlib.sha256((folder / sorted(SHARDS)[0]).read_bytes()).hexdigest()

    def lose(method: str, path: str) -> None:
        if when == "before the run" or "/commit/" in path:
            held.pop(lost, None)

    hub.faults = lose
    answer = run(machine, hub, step("finish", here))
    name = sorted(SHARDS)[0] if when == "before the run" else f"{sorted(SHARDS)[0]} and {len(SHARDS) - 1} more"
    assert answer["message"] == f"me/kept no longer has what was uploaded of {name}, and it was deleted here."
    assert answer["hint"] == "begin anew with `restart=True`"
    assert visible(hub, "me/kept") == {}
    assert any("/commit/" in request.path for request in hub.requests) == (when == "before the commit")
