"""Byte ranges of a remote file: resumed, stopped, and retried, against a loopback server."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from hub_server import Fault, Hub, ListedFaults, Request
from huggingface_hub.errors import HfHubHTTPError

from hcsmoe_hub.hub import retry as hub_failures
from hcsmoe_hub.hub import transfer
from hcsmoe_hub.hub.transfer import Stopped, receive

CONTENT = bytes(number % 251 for number in range(200_000))
START, END = 1000, 150_000


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(hub_failures, "PAUSES_SECONDS", (0.01, 0.01))
    # The client's own session refuses to leave this machine while the tests run.
    session = httpx2.Client(trust_env=False)
    monkeypatch.setattr(transfer, "get_session", lambda: session)
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "shard").write_bytes(CONTENT)
    with Hub() as server:
        server.add("org/name", folder)
        yield server


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "part"


def bring(hub: Hub, path: Path, *, name: str = "shard", stop: threading.Event | None = None) -> None:
    url = f"{hub.url}/org/name/resolve/main/{name}"
    receive(url, path, start=START, end=END, headers={"X-Test": "1"}, stop=stop or threading.Event())


def asked(requests: list[Request]) -> list[str | None]:
    return [request.range for request in requests]


def test_a_range_holds_the_bytes_of_the_file(hub: Hub, path: Path) -> None:
    bring(hub, path)
    assert path.read_bytes() == CONTENT[START:END]
    assert asked(hub.requests) == [f"bytes={START}-{END - 1}"]


def test_local_bytes_are_not_requested_again(hub: Hub, path: Path) -> None:
    path.write_bytes(CONTENT[START:5000])
    bring(hub, path)
    bring(hub, path)
    assert path.read_bytes() == CONTENT[START:END]
    assert asked(hub.requests) == [f"bytes=5000-{END - 1}"]


def test_a_file_that_is_too_long_is_downloaded_again(hub: Hub, path: Path) -> None:
    path.write_bytes(bytes(END))
    bring(hub, path)
    assert path.read_bytes() == CONTENT[START:END]


@pytest.mark.parametrize(
    "fault",
    [Fault.TOO_MANY_REQUESTS, Fault.SERVER_ERROR, Fault.BAD_GATEWAY, Fault.UNAVAILABLE, Fault.LOST_ANSWER],
)
def test_a_transient_failure_is_retried(fault: Fault, hub: Hub, path: Path) -> None:
    hub.faults = ListedFaults(*[("GET", "shard", fault)] * 2)
    bring(hub, path)
    assert path.read_bytes() == CONTENT[START:END]
    assert len(hub.requests) == 3


def test_a_broken_response_is_resumed_as_long_as_bytes_arrive(hub: Hub, path: Path) -> None:
    hub.faults = ListedFaults(*[("GET", "shard", Fault.CUT_ANSWER)] * 6)
    bring(hub, path)
    assert path.read_bytes() == CONTENT[START:END]
    assert sum(request.sent for request in hub.requests) == END - START


def test_a_lasting_failure_is_raised(hub: Hub, path: Path) -> None:
    hub.failures["/org/name/resolve"] = 503
    with pytest.raises(HfHubHTTPError, match="503"):
        bring(hub, path)
    assert len(hub.requests) == 3


def test_a_refusal_is_raised_at_once(hub: Hub, path: Path) -> None:
    with pytest.raises(HfHubHTTPError):
        bring(hub, path, name="nothing")
    assert len(hub.requests) == 1


def test_a_server_without_ranges_is_supported(hub: Hub, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = httpx2.Client(trust_env=False, event_hooks={"request": [lambda request: request.headers.pop("Range")]})
    monkeypatch.setattr(transfer, "get_session", lambda: session)
    path.write_bytes(CONTENT[START:5000])
    bring(hub, path)
    assert path.read_bytes() == CONTENT[START:END]
    assert asked(hub.requests) == [None]


def test_a_long_range_is_requested_in_parts(hub: Hub, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "MAX_REQUEST_BYTES", 80_000)
    bring(hub, path)
    assert path.read_bytes() == CONTENT[START:END]
    assert asked(hub.requests) == ["bytes=1000-80999", "bytes=81000-149999"]


def test_a_download_is_stopped_in_the_middle(hub: Hub, path: Path) -> None:
    hub.slow_pieces, hub.slow_seconds = 50, 0.1
    hub.faults = ListedFaults(("GET", "shard", Fault.SLOW))
    stop, begun = threading.Event(), time.monotonic()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(Stopped):
        bring(hub, path, stop=stop)
    # The whole body would take five seconds.
    assert time.monotonic() - begun < 3
    assert CONTENT[START:].startswith(path.read_bytes())


def test_a_pause_is_stopped_too(hub: Hub, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_failures, "PAUSES_SECONDS", (60.0,))
    hub.failures["/org/name/resolve"] = 503
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(Stopped):
        bring(hub, path, stop=stop)
