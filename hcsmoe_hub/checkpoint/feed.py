"""Downloads what a pass over a checkpoint reads, in order and ahead of the reader."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from hcsmoe_hub.checkpoint.downloads import Downloads
from hcsmoe_hub.checkpoint.open_files import OpenFiles
from hcsmoe_hub.checkpoint.pieces import Piece

# A single connection is slower than most lines.
THREADS = 4
# The current step and the next one.
WINDOW = 2
# How long a download that stays may take to notice that it is no longer needed.
GRACE_SECONDS = 2.0


class Feed:
    """Provides the pieces of a pass as files, and downloads the next ones in the background.

    With ``removes``, a piece is deleted as soon as all of its tensors have been read, and the pieces of a step are
    requested only when the last step but one is over. So the disk holds pieces of at most two consecutive steps,
    unfinished files included. Steps are read in order: finding a tensor implies that all earlier steps are over.

    When the feed is stopped, downloads that are deleted after use have to end by themselves, soon after the event is
    set. Others are given up after a moment: they may belong to a client that cannot be stopped.

    Args:
        steps: Pieces by step.
        fetch: Downloads a piece and returns its file; called in other threads, stops when the event is set.
        removes: Whether pieces are deleted once they have been read; otherwise all are downloaded and stay.

    Attributes:
        files: Opens the pieces; each is closed before it is deleted.
    """

    def __init__(
        self,
        steps: Sequence[Sequence[Piece]],
        fetch: Callable[[Piece, threading.Event], Path],
        *,
        removes: bool,
    ) -> None:
        self._steps = steps
        self._fetch = fetch
        self._removes = removes
        self._place = {
            name: (number, piece) for number, step in enumerate(steps) for piece in step for name in piece.tensors
        }
        self._unread = {piece: set(piece.tensors) for step in steps for piece in step}
        self._futures: dict[Piece, Future[Path]] = {}
        self.files = OpenFiles()
        self._failed: Future[Path] | None = None
        self._current = self._requested = 0
        self._stop = threading.Event()
        self._lock = threading.RLock()
        self._downloads = Downloads(THREADS)
        with self._lock:
            self._request_pieces()

    def _request_pieces(self) -> None:
        """Requests the pieces of all steps that may be on disk."""
        while self._current < len(self._steps) and not any(self._unread[piece] for piece in self._steps[self._current]):
            self._current += 1
        end = min(len(self._steps), self._current + WINDOW) if self._removes else len(self._steps)
        for step in self._steps[self._requested : end]:
            # Pieces of a skipped step are not needed.
            for piece in (piece for piece in step if self._unread[piece]):
                self._futures[piece] = future = self._downloads.submit(partial(self._fetch, piece, self._stop))
                future.add_done_callback(self._record_failure)
        self._requested = max(self._requested, end)

    def _record_failure(self, future: Future[Path]) -> None:
        if self._failed is None and not future.cancelled() and future.exception() is not None:
            self._failed = future

    def find(self, name: str) -> tuple[Path, int] | None:
        """Waits for a tensor.

        Args:
            name: Its name.

        Returns:
            A file that holds its shard from some position on, and that position; ``None`` if the feed does not contain
            its shard.

        Raises:
            SourceError: If its piece, or one that was requested ahead of it, cannot be downloaded.
        """
        if name not in self._place:
            return None
        number, piece = self._place[name]
        with self._lock:
            assert name in self._unread[piece], f"{name} was read before"
            if self._removes:
                self._skip_to(number)
        if self._failed is not None:
            # Fail now rather than hours later, when the pass reaches that piece.
            self._failed.result()
        return self._futures[piece].result(), piece.start

    def mark_read(self, name: str) -> None:
        """Marks a tensor as read; ignores tensors that the feed does not contain."""
        if name not in self._place:
            return
        _, piece = self._place[name]
        with self._lock:
            self._unread[piece].discard(name)
            if not self._unread[piece]:
                self._release(piece)
                self._request_pieces()

    def _skip_to(self, number: int) -> None:
        """Releases what earlier steps did not read."""
        for piece in (piece for step in self._steps[self._current : number] for piece in step):
            if self._unread[piece]:
                self._unread[piece].clear()
                self._release(piece)
        self._request_pieces()

    def _release(self, piece: Piece) -> None:
        """Closes a piece before deleting it: an open file would still occupy the disk."""
        future = self._futures.get(piece)
        if future is not None and not future.cancel():
            path = future.result()
            self.files.close(path)
            if self._removes:
                # Pieces of a shard that turned out to be wrong are gone; reading on raises its error.
                path.unlink(missing_ok=True)

    def stop(self) -> None:
        """Stops the downloads; threads that wait for one get ``CancelledError`` or the error of ``fetch``."""
        self._stop.set()
        self._downloads.cancel()
        if not self._removes:
            self._downloads.abandon()

    def close(self) -> bool:
        """Stops the downloads, and closes every file.

        Returns:
            Whether all downloads have ended.
        """
        self.stop()
        has_ended = self._downloads.join(None if self._removes else GRACE_SECONDS)
        self.files.close_all()
        return has_ended
