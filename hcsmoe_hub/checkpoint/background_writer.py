"""Writes the result on a thread of its own, while the next layer is computed."""

import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from hcsmoe_hub.checkpoint.writer import ShardWriter
from hcsmoe_hub.machine.transfer import Download, Leaving


class BackgroundWriter:
    """Takes tensors from any thread and writes them in that order on its own.

    A tensor must not change once it has been handed over. What goes wrong on the thread is raised by the next call.

    Args:
        writer: Writes them.
        device: Where results are computed.
        most_bytes: Most bytes that wait to be written; a single tensor may be larger.

    Attributes:
        bytes_taken: Bytes that were handed over.
    """

    def __init__(self, writer: ShardWriter, device: torch.device, *, most_bytes: int) -> None:
        self._writer = writer
        self._download = Download(device)
        self._most_bytes = most_bytes
        self.bytes_taken = 0
        # What to do, and how many bytes wait for it; the first one is being done.
        self._waiting: deque[tuple[Callable[[], None], int]] = deque()
        self._waiting_bytes = 0
        self._failure: BaseException | None = None
        self._is_stopped = False
        self._changed = threading.Condition()
        # Held while a file is written to.
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def write(self, name: str, tensor: Tensor) -> None:
        """Hands over one tensor; waits while too many bytes are to be written.

        Raises:
            BaseException: What has gone wrong with an earlier tensor.
        """
        leaving = self._download.mark(tensor)
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._failure is not None
                    or not self._waiting
                    or self._waiting_bytes + tensor.nbytes <= self._most_bytes
                )
            )
            self._raise_failure()
            self._waiting.append((partial(self._write, name, leaving), tensor.nbytes))
            self._waiting_bytes += tensor.nbytes
            self.bytes_taken += tensor.nbytes
            self._changed.notify_all()

    def after(self, task: Callable[[], None]) -> None:
        """Runs a task on the writer's thread when everything is written that was handed over before.

        Args:
            task: What to do, unless the writer is given up before. What it raises is raised by the next call.

        Raises:
            BaseException: What has gone wrong before.
        """
        with self._changed:
            self._raise_failure()
            self._waiting.append((partial(self._do, task), 0))
            self._changed.notify_all()

    def settle(self) -> None:
        """Waits until everything is written that was handed over.

        Raises:
            BaseException: What has gone wrong with one of the tensors.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or not self._waiting)
            self._raise_failure()

    def share(self) -> None:
        """Lets ranks that write to the same folder know what has been written so far; all call it equally often."""
        self._writer.share()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_stopped or bool(self._waiting))
                if self._is_stopped:
                    return
                action, size = self._waiting[0]
            try:
                action()
            # Whatever it is, it has to reach the thread that waits for the result.
            except BaseException as error:
                with self._changed:
                    self._failure = error
                    self._waiting.clear()
                    self._changed.notify_all()
                return
            with self._changed:
                self._waiting_bytes -= size
                # Nothing may keep the memory of a tensor while the thread waits for the next one.
                del action
                if self._waiting:
                    self._waiting.popleft()
                self._changed.notify_all()

    def _write(self, name: str, leaving: Leaving) -> None:
        # May take as long as the upload of a shard; a conversion that is given up does not wait for that.
        self._writer.wait_for_space()
        with self._writing:
            if not self._is_stopped:
                self._writer.write(name, leaving.values, partial(self._download.write, leaving))

    def _do(self, task: Callable[[], None]) -> None:
        with self._writing:
            if not self._is_stopped:
                task()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.settle()
        finally:
            with self._changed:
                self._is_stopped = True
                self._waiting.clear()
                self._changed.notify_all()
            # From here on no file is written to.
            with self._writing:
                pass
