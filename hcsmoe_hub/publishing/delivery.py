"""Sends the shards of a result while the conversion goes on, and frees their disk space."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from hcsmoe_hub.checkpoint.tensors import StoredTensor
from hcsmoe_hub.events import Listener, Warned, ignore
from hcsmoe_hub.hub.write_errors import PushError
from hcsmoe_hub.publishing.publisher import Publisher
from hcsmoe_hub.publishing.sent import SentLog, SentShard
from hcsmoe_hub.report import Pushed


class Delivery:
    """Receives finished shards from a writer and uploads them one after the other, on its own thread.

    Args:
        publisher: An open publisher.
        deletes: Delete each shard once it is uploaded, and make the writer wait until then. Otherwise a failed upload
            does not end the conversion: everything is retried with the commit.
        listener: Called with a warning after such a failure.
        log: Keeps what a later run needs of each shard before it is deleted; ``None`` keeps nothing.

    Attributes:
        sent: Tensors of the deleted shards, from their headers.
    """

    def __init__(
        self, publisher: Publisher, *, deletes: bool, listener: Listener = ignore, log: SentLog | None = None
    ) -> None:
        self._publisher = publisher
        self._deletes = deletes
        self._emit = listener
        self._log = log
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="delivery")
        self._tasks: list[Future[None]] = []
        self._has_failed = False
        # Held while a shard is uploaded, and what lets those that wait begin.
        self._sending = threading.Lock()
        self._may_begin = threading.Event()
        self._may_begin.set()
        self._folder: Path | None = None
        self.sent: dict[str, Mapping[str, StoredTensor]] = {}

    def take(self, shard: Path) -> None:
        """Starts to upload a finished shard."""
        self._tasks.append(self._pool.submit(self._send, shard))

    def wait_for_space(self) -> None:
        """Waits until no finished shard is left on the disk, if shards are deleted.

        Raises:
            PushError: If one cannot be uploaded.
        """
        if self._deletes:
            for task in self._tasks:
                task.result()

    @contextmanager
    def moving(self, folder: Path) -> Iterator[None]:
        """Lets no upload run inside a ``with`` block, which moves all files to another folder.

        Args:
            folder: Where they are afterwards.
        """
        # A lock alone would wait for all shards: the thread that sends them would take it again at once.
        self._may_begin.clear()
        try:
            with self._sending:
                yield
                self._folder = folder
                self._publisher.moved(folder)
        finally:
            self._may_begin.set()

    def _send(self, shard: Path) -> None:
        self._may_begin.wait()
        with self._sending:
            self._send_alone(shard if self._folder is None else self._folder / shard.name)

    def _send_alone(self, shard: Path) -> None:
        if self._has_failed:
            return
        try:
            held = self._publisher.upload(shard)
        except PushError as error:
            self._has_failed = True
            if self._deletes:
                raise
            self._emit(Warned(f"{error.message} The conversion continues; the upload is retried at the end."))
            return
        if self._deletes and held:
            record = self._publisher.describe(shard)
            if self._log is not None:
                self._log.note_sent(record)
            self.sent[shard.name] = record.tensors
            shard.unlink()

    def restore(self, records: Sequence[SentShard], folder: Path) -> None:
        """Takes over shards that an interrupted conversion has sent.

        Args:
            records: What was kept of them.
            folder: Where they are deleted, if that had not been done yet.

        Raises:
            PushError: If the Hub says that it no longer has one of them.
        """
        self._publisher.restore(records)
        for record in records:
            self.sent[record.shard] = record.tensors
            (folder / record.shard).unlink(missing_ok=True)

    def commit(self, files: Sequence[Path]) -> Pushed:
        """Uploads the remaining files and commits everything.

        Args:
            files: Every file of the result that is still in its folder.

        Raises:
            PushError: If a file cannot be uploaded; the branch is then unchanged.
        """
        for task in self._tasks:
            task.result()
        return self._publisher.commit(*files)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._publisher.cancel()
        self._pool.shutdown(cancel_futures=True)
