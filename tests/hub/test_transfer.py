"""Byte ranges of a remote file: resumed, stopped, and retried, against a loopback server."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from hub_server import Fault, Hub, ListedFaults, Request
from huggingface_hub.errors import HfHubHTTPError

from hcsmoe_hub.hub import retry as hub_failures
from hcsmoe_hub.hub import transfer
from hcsmoe_hub.hub.errors import ForeignAnswer, Stopped
from hcsmoe_hub.hub.transfer import Remote, receive

CONTENT = bytes(number % 251 for number in range(200_000))
START, END = 1000, 150_000


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(hub_failures, "PAUSES_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(transfer, "BLOCK_BYTES", 1000)
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


def bring(hub: Hub, path: Path, *, name: str = "shard", stop: threading.Event | None = None, end: int = END) -> None:
    url = f"{hub.url}/org/name/resolve/main/{name}"
    etag = hub.model("org/name").at("main").files["shard"].etag
    remote = Remote(url=url, headers={"X-Test": "1"}, size=len(CONTENT), etag=etag)
    receive(remote, path, start=START, end=end, stop=stop or threading.Event())


def leave(hub: Hub, path: Path, nbytes: int) -> None:
    """What an earlier process has left of a download."""
    bring(hub, path, end=START + nbytes)
    hub.requests.clear()


def asked(requests: list[Request]) -> list[str | None]:
    return [request.range for request in requests]


def test_a_range_holds_the_bytes_of_the_file(hub: Hub, path: Path) -> None:
    bring(hub, path)
    assert path.read_bytes() == CONTENT[START:END]
    assert asked(hub.requests) == [f"bytes={START}-{END - 1}"]


def test_local_bytes_are_not_requested_again(hub: Hub, path: Path) -> None:
    leave(hub, path, 4000)
    bring(hub, path)
    bring(hub, path)
    assert path.read_bytes() == CONTENT[START:END]
    assert asked(hub.requests) == [f"bytes=5000-{END - 1}"]


def test_bytes_without_a_hash_are_requested_again(hub: Hub, path: Path) -> None:
    leave(hub, path, 4500)
    path.write_bytes(CONTENT[START : START + 6000])
    bring(hub, path)
    assert path.read_bytes() == CONTENT[START:END]
    assert asked(hub.requests) == [f"bytes={START + 4000}-{END - 1}"]


def test_damaged_bytes_are_requested_again(hub: Hub, path: Path) -> None:
    leave(hub, path, 4000)
    path.write_bytes(path.read_bytes()[:2500] + bytes(1500))
    bring(hub, path)
    assert path.read_bytes() == CONTENT[START:END]
    assert asked(hub.requests) == [f"bytes={START + 2000}-{END - 1}"]


def test_a_file_that_is_too_long_is_downloaded_again(hub: Hub, path: Path) -> None:
    path.write_bytes(bytes(END))
    bring(hub, path)
    assert path.read_bytes() == CONTENT[START:END]


def test_two_downloads_to_one_file_write_the_same_bytes(hub: Hub, path: Path) -> None:
    hub.slow_pieces, hub.slow_seconds = 20, 0.01
    hub.faults = lambda method, path: Fault.SLOW
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(bring, hub, path) for _ in range(4)]:
            done.result()
    assert path.read_bytes() == CONTENT[START:END]


def test_an_answer_about_another_version_is_refused(hub: Hub, path: Path) -> None:
    url = f"{hub.url}/org/name/resolve/main/shard"
    for size, etag, reason in ((len(CONTENT), "0" * 64, "not about 0000"), (len(CONTENT) + 1, "", "of a file of")):
        remote = Remote(url=url, headers={}, size=size, etag=etag)
        with pytest.raises(ForeignAnswer, match=reason):
            receive(remote, path, start=START, end=END, stop=threading.Event())


def test_a_page_of_a_proxy_is_refused(hub: Hub, path: Path) -> None:
    hub.pages.add("/org/name/resolve/main/shard")
    with pytest.raises(ForeignAnswer, match="text/html"):
        bring(hub, path)
    assert path.read_bytes() == b""


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
    leave(hub, path, 4000)
    monkeypatch.setattr(transfer, "get_session", lambda: session)
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
