"""Downloads over Xet, as far as a loopback storage server shows them."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hub_client import Answers, Machine
from hub_server import Hub
from places import EXAMPLE, TESTS

from hcsmoe_hub.checkpoint.source import LocalSource
from hub.reader import read_all

READER = TESTS / "hub" / "reader.py"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as server:
        for name in ("whole", "pieces", "broken", "without"):
            server.add(f"org/{name}", EXAMPLE).xet = True
        yield server


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("machine"))


@pytest.fixture(scope="module")
def answers(hub: Hub, machine: Machine) -> Answers:
    calls = {name: {"source": f"org/{name}", "low_disk": name == "pieces"} for name in ("whole", "pieces")}
    return machine.run(hub.url, calls, (READER,), HF_HUB_DISABLE_XET="0")


@pytest.fixture(scope="module")
def expected() -> Mapping[str, object]:
    return read_all(LocalSource(EXAMPLE))


@pytest.mark.parametrize("name", ["whole", "pieces"])
def test_what_is_read_is_what_the_repository_holds(name: str, answers: Answers, expected: Mapping[str, object]) -> None:
    assert answers[name]["digest"] == expected["digest"]


def test_whole_shards_come_over_xet(hub: Hub, answers: Answers) -> None:
    assert bodies(hub, "whole") == []
    assert any(request.path.startswith("/_xorbs/") for request in hub.requests)


def test_pieces_come_by_range(hub: Hub, answers: Answers) -> None:
    assert len(bodies(hub, "pieces")) > 2
    assert all(bodies(hub, "pieces"))


def test_xet_is_not_used_where_it_is_switched_off(
    hub: Hub, answers: Answers, machine: Machine, expected: Mapping[str, object]
) -> None:
    first = len(hub.requests)
    calls = {"it": {"source": "org/without"}}
    assert machine.run(hub.url, calls, (READER,), HF_HUB_DISABLE_XET="1")["it"]["digest"] == expected["digest"]
    assert not any(request.path.startswith(("/_xet/", "/_xorbs/")) for request in hub.requests[first:])
    assert bodies(hub, "without") == [None, None]


def test_a_failure_of_xet_is_one_message(hub: Hub, answers: Answers, tmp_path: Path) -> None:
    hub.failures["/_xorbs"] = 404
    calls = {"it": {"source": "org/broken"}}
    # In the cache of the others, the client would find the same content.
    refusal = Machine(tmp_path).run(hub.url, calls, (READER,), HF_HUB_DISABLE_XET="0")["it"]
    del hub.failures["/_xorbs"]
    assert refusal["message"].startswith("org/broken cannot be downloaded over Xet: ")
    assert "404 Not Found" in refusal["message"]
    assert "http://" not in refusal["message"]
    assert "HF_HUB_DISABLE_XET=1" in refusal["hint"]


def bodies(hub: Hub, name: str) -> list[str | None]:
    """The ranges of requests for shards, without those for their headers."""
    found = [request for request in hub.requests if request.method == "GET" and request.path.endswith(".safetensors")]
    return [
        request.range
        for request in found
        if request.path.startswith(f"/org/{name}/") and request.range != "bytes=0-99999"
    ]
