"""The feed of a pass: downloads ahead of its reader, within a limit of disk space."""

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from hcsmoe_hub.checkpoint import feed as feed_module
from hcsmoe_hub.checkpoint.feed import Feed
from hcsmoe_hub.checkpoint.pieces import Piece, download_bytes, largest_pair
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.hub.errors import Stopped


def piece(step: int, number: int, size: int) -> Piece:
    """A piece of two tensors."""
    names = (f"{step}.{number}.a", f"{step}.{number}.b")
    return Piece(shard=f"shard-{number}", start=1000 * step, end=1000 * step + size, tensors=names)


class Store:
    """Writes pieces as files of their size, and records requests; held pieces wait until they are released."""

    def __init__(self, folder: Path, *, held: Sequence[Piece] = ()) -> None:
        self.folder = folder
        self.asked: list[Piece] = []
        self.most = 0
        self.held = {one: threading.Event() for one in held}
        self._lock = threading.Lock()
        self._request = threading.Condition()

    def fetch(self, one: Piece, stop: threading.Event) -> Path:
        with self._request:
            self.asked.append(one)
            self._request.notify_all()
        while one in self.held and not self.held[one].wait(0.01):
            if stop.is_set():
                raise Stopped
        path = self.folder / f"{one.shard}.{one.start}"
        with path.open("wb") as file:
            for part in range(0, one.nbytes, 7):
                file.write(bytes(min(7, one.nbytes - part)))
                file.flush()
                self.measure()
        return path

    def measure(self) -> int:
        with self._lock:
            now = 0
            for file in self.folder.iterdir():
                # The feed may delete it meanwhile.
                with suppress(FileNotFoundError):
                    now += file.stat().st_size
            self.most = max(self.most, now)
            return now

    def wait_for(self, count: int) -> None:
        """Waits until ``count`` pieces have been requested."""
        with self._request:
            assert self._request.wait_for(lambda: len(self.asked) >= count, timeout=30)


class Immediate:
    """Makes a download as soon as it is submitted, so that what has been requested does not depend on threads."""

    def __init__(self, threads: int) -> None: ...

    def submit(self, call: Callable[[], Path]) -> Future[Path]:
        future: Future[Path] = Future()
        try:
            future.set_result(call())
        except SourceError as error:
            future.set_exception(error)
        return future

    def cancel(self) -> None: ...

    def abandon(self) -> None: ...

    def join(self, seconds: float | None) -> bool:
        return True


@pytest.fixture
def immediate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes feeds download without threads."""
    monkeypatch.setattr(feed_module, "Downloads", Immediate)


def read(feed: Feed, one: Piece) -> None:
    for name in one.tensors:
        found = feed.find(name)
        assert found is not None
        assert (found[0].stat().st_size, found[1]) == (one.nbytes, one.start)
        feed.mark_read(name)


STEPS = [[piece(0, 0, 50), piece(0, 1, 30)], [piece(1, 0, 20)], [piece(2, 0, 40)], [piece(3, 0, 10), piece(3, 1, 10)]]


def test_everything_is_downloaded_in_order_and_stays(tmp_path: Path) -> None:
    store = Store(tmp_path)
    feed = Feed(STEPS, store.fetch, removes=False)
    for one in (one for step in STEPS for one in step):
        read(feed, one)
    feed.close()
    assert sorted(store.asked, key=str) == sorted((one for step in STEPS for one in step), key=str)
    assert store.measure() == download_bytes(STEPS)


@pytest.mark.usefixtures("immediate")
def test_only_this_step_and_the_next_are_requested(tmp_path: Path) -> None:
    store = Store(tmp_path)
    feed = Feed(STEPS, store.fetch, removes=True)
    asked = []
    for step in STEPS:
        asked.append(len(store.asked))
        for one in step:
            read(feed, one)
    feed.close()
    assert asked == [3, 4, 6, 6]


def test_a_piece_is_deleted_with_its_last_tensor(tmp_path: Path) -> None:
    feed = Feed(STEPS, Store(tmp_path).fetch, removes=True)
    (one, other), (next_one,), *_ = STEPS
    for name in one.tensors:
        assert feed.find(name) is not None
    feed.find(other.tensors[0])
    feed.mark_read(one.tensors[0])
    assert (tmp_path / "shard-0.0").exists()
    feed.mark_read(one.tensors[1])
    assert not (tmp_path / "shard-0.0").exists()
    assert (tmp_path / "shard-1.0").exists()
    feed.find(next_one.tensors[0])
    # Reading the next step ends this one.
    assert not (tmp_path / "shard-1.0").exists()
    feed.close()


def test_a_piece_that_is_gone_when_it_has_been_read_is_not_missed(tmp_path: Path) -> None:
    feed = Feed(STEPS, Store(tmp_path).fetch, removes=True)
    (one, _), *_ = STEPS
    for name in one.tensors:
        assert feed.find(name) is not None
    (tmp_path / "shard-0.0").unlink()
    for name in one.tensors:
        feed.mark_read(name)
    feed.close()


@pytest.mark.parametrize("seed", range(3))
def test_the_disk_never_holds_more_than_two_steps(seed: int, tmp_path: Path) -> None:
    generator = random.Random(seed)
    steps = [
        [piece(step, number, generator.randrange(1, 90)) for number in range(generator.randrange(4))]
        for step in range(12)
    ]
    store = Store(tmp_path)
    feed = Feed(steps, store.fetch, removes=True)
    for step in steps:
        # Like a loader that has its own threads.
        with ThreadPoolExecutor(2) as threads:
            for done in [threads.submit(read, feed, one) for one in step]:
                done.result()
        store.measure()
    feed.close()
    assert len(store.asked) == len(set(store.asked)) == sum(map(len, steps))
    assert store.measure() == 0
    assert 0 < store.most <= largest_pair(steps)


def test_skipped_steps_are_deleted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    feed = Feed(STEPS, store.fetch, removes=True)
    for one in STEPS[3]:
        read(feed, one)
    feed.close()
    assert store.measure() == 0
    # The third step was never due.
    assert STEPS[2][0] not in store.asked


def test_a_tensor_of_another_shard_is_not_in_the_feed(tmp_path: Path) -> None:
    feed = Feed(STEPS, Store(tmp_path).fetch, removes=True)
    assert feed.find("elsewhere") is None
    feed.mark_read("elsewhere")
    feed.close()


@pytest.mark.usefixtures("immediate")
def test_a_failure_ahead_is_reported_before_its_turn(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def fetch(one: Piece, stop: threading.Event) -> Path:
        if one in STEPS[3]:
            raise SourceError("it is gone.", hint="try again")
        return store.fetch(one, stop)

    feed = Feed(STEPS, fetch, removes=False)
    with pytest.raises(SourceError, match="it is gone"):
        feed.find(STEPS[0][0].tensors[0])
    feed.close()


@pytest.mark.parametrize("removes", [True, False])
def test_waiting_readers_get_an_error_when_the_feed_is_stopped(removes: bool, tmp_path: Path) -> None:
    everything = [one for step in STEPS for one in step]
    store = Store(tmp_path, held=everything)
    feed = Feed(STEPS, store.fetch, removes=removes)
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(feed.find, one.tensors[0]) for one in STEPS[0]]
        store.wait_for(2)
        feed.stop()
        for one in waiting:
            with pytest.raises((Stopped, CancelledError)):
                one.result(timeout=5)
    feed.close()
    assert not list(tmp_path.iterdir())


def test_a_download_that_cannot_be_stopped_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "GRACE_SECONDS", 0.1)
    begun, released = threading.Event(), threading.Event()

    def fetch(one: Piece, stop: threading.Event) -> Path:
        begun.set()
        released.wait()
        return tmp_path

    feed = Feed(STEPS, fetch, removes=False)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(feed.find, STEPS[0][0].tensors[0])
        begun.wait()
        feed.stop()
        with pytest.raises(CancelledError):
            waiting.result(timeout=5)
    assert not feed.close()
    released.set()
    assert feed.close()
