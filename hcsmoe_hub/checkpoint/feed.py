"""Downloads what a pass over a checkpoint reads, ahead of the pass and in its order."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from hcsmoe_hub.checkpoint.pieces import Piece

# One connection alone is slower than most lines.
THREADS = 4
# The step that is read, and the one after it.
WINDOW = 2


class Feed:
    """Hands out the pieces of a pass as files, and downloads the next ones meanwhile.

    With ``removes``, a piece is deleted as soon as each of its tensors was read, and none is asked for before the step
    that comes two before its own is over. So what is on disk, unfinished files included, are pieces of two steps in a
    row at most. Steps are read one after the other: whoever asks for a tensor says that the steps before it are over.

    Args:
        steps: Pieces by step.
        fetch: Brings a piece and returns its file; called in other threads. The event tells it to give up.
        removes: Whether pieces are deleted once they were read; otherwise all of them are downloaded and stay.
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
        self._files: dict[Piece, int] = {}
        self._failed: Future[Path] | None = None
        self._current = self._asked = 0
        self._stop = threading.Event()
        self._lock = threading.RLock()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="download")
        with self._lock:
            self._ask()

    def _ask(self) -> None:
        """Asks for the pieces of all steps that may be on disk by now."""
        while self._current < len(self._steps) and not any(self._unread[piece] for piece in self._steps[self._current]):
            self._current += 1
        end = min(len(self._steps), self._current + WINDOW) if self._removes else len(self._steps)
        for step in self._steps[self._asked : end]:
            # A step that was left out before anybody asked for it has nothing to wait for.
            for piece in (piece for piece in step if self._unread[piece]):
                self._futures[piece] = future = self._pool.submit(self._fetch, piece, self._stop)
                future.add_done_callback(self._note)
        self._asked = max(self._asked, end)

    def _note(self, future: Future[Path]) -> None:
        if not future.cancelled() and future.exception() is not None:
            self._failed = future

    def open(self, name: str) -> tuple[int, int] | None:
        """Waits for a tensor.

        Args:
            name: Its name.

        Returns:
            An open file that holds its shard from some position on, and that position; ``None`` if its shard is no
            part of the feed.

        Raises:
            SourceError: If its piece, or one that was asked for ahead, cannot be downloaded.
        """
        if name not in self._place:
            return None
        number, piece = self._place[name]
        with self._lock:
            assert name in self._unread[piece], f"{name} was read before"
            if self._removes:
                self._skip_to(number)
        if self._failed is not None:
            # Better told now than after the hours that it takes to get there.
            self._failed.result()
        path = self._futures[piece].result()
        with self._lock:
            if piece not in self._files:
                self._files[piece] = os.open(path, os.O_RDONLY)
            return self._files[piece], piece.start

    def was_read(self, name: str) -> None:
        """Takes note that nobody needs a tensor any more; of tensors of other shards too."""
        if name not in self._place:
            return
        _, piece = self._place[name]
        with self._lock:
            self._unread[piece].discard(name)
            if not self._unread[piece]:
                self._release(piece)
                self._ask()

    def _skip_to(self, number: int) -> None:
        """Lets go of what earlier steps did not read."""
        for piece in (piece for step in self._steps[self._current : number] for piece in step):
            if self._unread[piece]:
                self._unread[piece].clear()
                self._release(piece)
        self._ask()

    def _release(self, piece: Piece) -> None:
        """Closes a piece, then deletes it: an open file would keep its place on disk."""
        if piece in self._files:
            os.close(self._files.pop(piece))
        future = self._futures.get(piece)
        if self._removes and future is not None and not future.cancel():
            future.result().unlink()

    def stop(self) -> None:
        """Ends the downloads; who waits for one is told that it was cancelled."""
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Ends the downloads and waits until they have, and closes every file."""
        self.stop()
        self._pool.shutdown(wait=True)
        with self._lock:
            for file in self._files.values():
                os.close(file)
            self._files.clear()
