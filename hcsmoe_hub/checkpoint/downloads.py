"""Threads for downloads, which need not end before the process does."""

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from time import monotonic

Task = tuple[Future[Path], Callable[[], Path]]


class Downloads:
    """Runs downloads in the order in which they are submitted, several at a time.

    The threads are daemons: the Hub's client cannot be stopped while it waits for a server, and a thread of
    ``ThreadPoolExecutor`` would keep the process from ending.

    Args:
        threads: How many run at the same time.
    """

    def __init__(self, threads: int) -> None:
        self._most = threads
        self._threads: list[threading.Thread] = []
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._running: set[Future[Path]] = set()
        self._lock = threading.Lock()

    def submit(self, call: Callable[[], Path]) -> Future[Path]:
        """Runs a call as soon as a thread is free."""
        future: Future[Path] = Future()
        self._tasks.put((future, call))
        if len(self._threads) < self._most:
            thread = threading.Thread(target=self._work, name=f"download-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, call = task
            if not future.set_running_or_notify_cancel():
                continue
            with self._lock:
                self._running.add(future)
            _settle(future, call)
            with self._lock:
                self._running.discard(future)

    def cancel(self) -> None:
        """Begins no further download; those who wait for one of these get ``CancelledError``."""
        while not self._tasks.empty():
            task = self._tasks.get()
            if task is not None:
                task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)

    def abandon(self) -> None:
        """Those who wait for a running download get ``CancelledError`` at once, even though it may go on."""
        with self._lock:
            running = list(self._running)
        for future in running:
            # It may have ended meanwhile.
            with suppress(InvalidStateError):
                future.set_exception(CancelledError())

    def join(self, seconds: float | None) -> bool:
        """Waits for the threads to end, after ``cancel``; returns whether they have.

        Args:
            seconds: How long to wait; ``None`` for as long as it takes.
        """
        deadline = None if seconds is None else monotonic() + seconds
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


def _settle(future: Future[Path], call: Callable[[], Path]) -> None:
    """Runs a call; its future may have been abandoned meanwhile."""
    try:
        path = call()
    # Whatever it is, it has to reach the thread that waits for the result.
    except BaseException as error:
        with suppress(InvalidStateError):
            future.set_exception(error)
    else:
        with suppress(InvalidStateError):
            future.set_result(path)
