"""Sends the shards of a result while the conversion goes on, and frees their disk space."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from hcsmoe_hub.checkpoint.tensors import StoredTensor, local_header, stored_tensors
from hcsmoe_hub.events import Listener, Warned, ignore
from hcsmoe_hub.hub.write_errors import PushError
from hcsmoe_hub.publishing.publisher import Publisher
from hcsmoe_hub.report import Pushed


class Delivery:
    """Receives finished shards from a writer and uploads them one after the other, on its own thread.

    Args:
        publisher: An open publisher.
        deletes: Delete each shard once it is uploaded, and make the writer wait until then. Otherwise a failed upload
            does not end the conversion: everything is retried with the commit.
        listener: Called with a warning after such a failure.

    Attributes:
        sent: Tensors of the deleted shards, from their headers.
    """

    def __init__(self, publisher: Publisher, *, deletes: bool, listener: Listener = ignore) -> None:
        self._publisher = publisher
        self._deletes = deletes
        self._emit = listener
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="delivery")
        self._tasks: list[Future[None]] = []
        self._has_failed = False
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

    def _send(self, shard: Path) -> None:
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
            header, data_start = local_header(shard)
            size = shard.stat().st_size
            self.sent[shard.name] = stored_tensors(header, shard=shard.name, data_start=data_start, file_bytes=size)
            shard.unlink()

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
