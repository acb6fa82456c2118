"""Shards that are uploaded while others are written: deletion, waiting, and failures."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hcsmoe_hub.checkpoint.tensors import local_header
from hcsmoe_hub.events import Event, Warned
from hcsmoe_hub.hub.write_errors import PushError
from hcsmoe_hub.publishing.delivery import Delivery
from hcsmoe_hub.publishing.sent import SentShard
from hcsmoe_hub.report import Pushed

DEADLINE_SECONDS = 20


class Sender:
    """Stands in for the connection: holds or refuses the given shards."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses = refuses
        self.uploaded: list[str] = []
        self.committed: list[str] = []
        self.restored: list[str] = []
        self.is_cancelled = False
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def upload(self, *paths: Path) -> list[Path]:
        assert self.may_go_on.wait(DEADLINE_SECONDS)
        self.uploaded += [path.name for path in paths]
        if self.refuses:
            raise PushError("the Hub is full.", hint="make room")
        return list(paths)

    def describe(self, path: Path) -> SentShard:
        header, data_start = local_header(path)
        content = path.read_bytes()
        return SentShard(
            shard=path.name,
            repo_id="me/model",
            size=len(content),
            sha256=sha256(content).hexdigest(),
            sample=content[:512],
            header=header,
            data_start=data_start,
        )

    def restore(self, records: Sequence[SentShard]) -> None:
        self.restored += [record.shard for record in records]

    def commit(self, *paths: Path) -> Pushed:
        self.committed = [path.name for path in paths]
        return None  # type: ignore[return-value]

    def cancel(self) -> None:
        self.is_cancelled = True
        self.may_go_on.set()


def shard(folder: Path, name: str) -> Path:
    path = folder / f"{name}.safetensors"
    save_file({name: torch.zeros(2, 3)}, path)
    return path


class Log:
    """Keeps records, as JSON holds them; fails where a disk is full."""

    def __init__(self, *, is_full: bool = False) -> None:
        self.is_full = is_full
        self.lines: list[str] = []

    def note_sent(self, record: SentShard) -> None:
        if self.is_full:
            raise OSError(28, "No space left on device")
        self.lines.append(json.dumps(record.as_dict()))

    def sent(self) -> Sequence[SentShard]:
        return [SentShard.from_dict({"step": "sent", **json.loads(line)}) for line in self.lines]


MakeDelivery = Callable[..., Delivery]


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def make(events: list[Event]) -> MakeDelivery:
    def made(sender: Sender, *, deletes: bool, log: Log | None = None) -> Delivery:
        return Delivery(sender, deletes=deletes, listener=events.append, log=log)  # type: ignore[arg-type]

    return made


def test_a_shard_that_is_uploaded_is_deleted_and_recorded(tmp_path: Path, make: MakeDelivery) -> None:
    path = shard(tmp_path, "a")
    with make(Sender(), deletes=True) as delivery:
        delivery.take(path)
        delivery.wait_for_space()
        assert not path.exists()
        assert delivery.sent["a.safetensors"]["a"].shape == (2, 3)


def test_a_later_run_has_what_was_kept_of_a_deleted_shard(tmp_path: Path, make: MakeDelivery) -> None:
    path, log, later = shard(tmp_path, "a"), Log(), Sender()
    content = path.read_bytes()
    with make(Sender(), deletes=True, log=log) as delivery:
        delivery.take(path)
        delivery.wait_for_space()
    (record,) = log.sent()
    assert (record.size, record.sample) == (len(content), content[:512])
    # The first run has ended before it deleted the shard.
    path.write_bytes(content)
    with make(later, deletes=True, log=log) as delivery:
        delivery.restore(log.sent(), tmp_path)
        assert delivery.sent["a.safetensors"] == record.tensors
        assert delivery.sent["a.safetensors"]["a"].shape == (2, 3)
    assert later.restored == ["a.safetensors"]
    assert not path.exists()


def test_a_shard_of_which_nothing_can_be_kept_is_not_deleted(tmp_path: Path, make: MakeDelivery) -> None:
    path = shard(tmp_path, "a")
    with make(Sender(), deletes=True, log=Log(is_full=True)) as delivery:
        delivery.take(path)
        with pytest.raises(OSError, match="No space left"):
            delivery.wait_for_space()
    assert path.exists()


def test_a_shard_that_stays_needs_no_record(tmp_path: Path, make: MakeDelivery) -> None:
    log = Log()
    with make(Sender(), deletes=False, log=log) as delivery:
        delivery.take(shard(tmp_path, "a"))
        delivery.commit([])
    assert log.lines == []


def test_the_writer_waits_for_disk_space(tmp_path: Path, make: MakeDelivery) -> None:
    sender, path, has_room = Sender(), shard(tmp_path, "a"), threading.Event()
    sender.may_go_on.clear()
    with make(sender, deletes=True) as delivery:
        delivery.take(path)
        writer = threading.Thread(target=lambda: (delivery.wait_for_space(), has_room.set()))
        writer.start()
        assert not has_room.wait(0.05)
        sender.may_go_on.set()
        assert has_room.wait(DEADLINE_SECONDS)
        writer.join()


def test_without_deletion_the_writer_does_not_wait_and_the_shard_stays(tmp_path: Path, make: MakeDelivery) -> None:
    sender, path = Sender(), shard(tmp_path, "a")
    sender.may_go_on.clear()
    with make(sender, deletes=False) as delivery:
        delivery.take(path)
        delivery.wait_for_space()
        sender.may_go_on.set()
        delivery.commit([path])
    assert path.exists()
    assert delivery.sent == {}
    assert sender.committed == ["a.safetensors"]


def test_a_failure_ends_a_conversion_that_deletes_shards(tmp_path: Path, make: MakeDelivery) -> None:
    path = shard(tmp_path, "a")
    with make(Sender(refuses=True), deletes=True) as delivery:
        delivery.take(path)
        with pytest.raises(PushError, match="the Hub is full"):
            delivery.wait_for_space()
    assert path.exists()


def test_otherwise_the_commit_retries_the_upload(tmp_path: Path, make: MakeDelivery, events: list[Event]) -> None:
    sender, paths = Sender(refuses=True), [shard(tmp_path, name) for name in "abc"]
    with make(sender, deletes=False) as delivery:
        for path in paths:
            delivery.take(path)
            delivery.wait_for_space()
        delivery.commit(paths)
    assert sender.uploaded == ["a.safetensors"]
    assert sender.committed == ["a.safetensors", "b.safetensors", "c.safetensors"]
    (warning,) = events
    assert isinstance(warning, Warned)
    assert warning.message == "the Hub is full. The conversion continues; the upload is retried at the end."


def test_an_upload_ends_with_the_conversion(tmp_path: Path, make: MakeDelivery) -> None:
    sender = Sender()
    sender.may_go_on.clear()

    def interrupted() -> None:
        with make(sender, deletes=False) as delivery:
            for name in "abc":
                delivery.take(shard(tmp_path, name))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sender.is_cancelled
    assert sender.uploaded in ([], ["a.safetensors"])


def test_no_shard_is_sent_while_files_are_moved_and_those_that_wait_are_found_afterwards(
    tmp_path: Path, make: MakeDelivery
) -> None:
    sender = Moving()
    paths = [shard(tmp_path, name) for name in "abc"]
    sender.may_go_on.clear()
    target = tmp_path / "moved"
    target.mkdir()
    with make(sender, deletes=False) as delivery:
        for path in paths:
            delivery.take(path)
        assert sender.began.wait(DEADLINE_SECONDS)
        # The first one is on its way, and the others wait.
        threading.Timer(0.05, sender.may_go_on.set).start()
        with delivery.moving(target):
            before = list(sender.uploaded)
            for path in paths:
                path.rename(target / path.name)
            time.sleep(0.05)
            assert sender.uploaded == before
        delivery.commit([])
    assert sender.folder == target
    assert sender.uploaded == ["a.safetensors", "b.safetensors", "c.safetensors"]


class Moving(Sender):
    """A connection that looks for the files that it is to send."""

    def __init__(self) -> None:
        super().__init__()
        self.began = threading.Event()
        self.folder: Path | None = None

    def upload(self, *paths: Path) -> list[Path]:
        self.began.set()
        held = super().upload(*paths)
        assert all(path.is_file() for path in paths)
        return held

    def moved(self, folder: Path) -> None:
        self.folder = folder
