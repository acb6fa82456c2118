"""Processes that a launcher has started side by side (torchrun, accelerate, srun): they meet, and watch each other.

A process that dies would leave the others waiting in a collective for good. Each of them therefore shows every other
second in a common store that it is alive; if one falls silent or reports a failure, the others end, too.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import torch.distributed as dist
from torch import get_device_module
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from hcsmoe_hub.errors import HcsmoeError, PlanError
from hcsmoe_hub.machine import accelerator
from hcsmoe_hub.machine.ranks import RankLostError
from hcsmoe_hub.machine.signals import is_stopping

MEETING = timedelta(minutes=10)
# Ranks wait for each other as long as all are alive: for a download, or for a push at the end.
COLLECTIVE = timedelta(days=30)
PERIOD_SECONDS = 2.0
SILENCE_SECONDS = 18.0
# Time to remove what is unfinished, once another rank is lost; a collective may never return.
GRACE_SECONDS = 6.0
# A rank that has failed itself is the one to report it, the first rank before others.
REPORT_SECONDS = 3.0


@contextmanager
def meeting() -> Iterator["Watch"]:
    """Lets processes share what happens inside a ``with`` block; their environment is that of ``torchrun``.

    Yields:
        What watches the other ranks.

    Raises:
        PlanError: If the ranks do not find each other, or outnumber the accelerators of a machine.
        RankLostError: If another rank ends before this one.
    """
    watch = _meet()
    try:
        yield watch
    except BaseException as error:
        watch.fail(error)
        raise
    else:
        watch.stop()
        dist.barrier()
        dist.destroy_process_group()


def _meet() -> "Watch":
    """Connects to the other processes."""
    local, count = int(os.environ.get("LOCAL_RANK", "0")), accelerator.count()
    backend = "gloo"
    if count:
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > count:
            raise PlanError(
                f"{os.environ['LOCAL_WORLD_SIZE']} ranks were started on a machine with {count} accelerators.",
                hint="start as many ranks as there are accelerators",
            )
        if dist.is_nccl_available():
            get_device_module(accelerator.KIND).set_device(local)
            backend = f"cpu:gloo,{accelerator.KIND}:nccl"
    try:
        store, number, size = next(rendezvous("env://", timeout=MEETING))
        watch = Watch(number, size)
        shared = PrefixStore("hcsmoe", store)
        dist.init_process_group(backend, store=shared, rank=number, world_size=size, timeout=COLLECTIVE)
    except (dist.DistError, ValueError) as error:
        raise PlanError(
            f"the ranks do not find each other: {str(error).partition(chr(10))[0].rstrip('.')}.",
            hint="start all of them with the same launcher, and check MASTER_ADDR and MASTER_PORT",
        ) from error
    return watch


class Watch:
    """Watches the other ranks from a thread, and ends this one if one of them is lost.

    Args:
        number: Which rank this is.
        size: How many there are.
    """

    def __init__(self, number: int, size: int) -> None:
        self._number, self._size = number, size
        # A connection of its own: torch holds that of a process group while it waits for others.
        self._store = PrefixStore("hcsmoe-watch", _connect())
        self._stopped = threading.Event()
        self._lost: str | None = None
        self._has_failed = False
        self._store.add(_alive(number), 1)
        signal.signal(signal.SIGTERM, self._on_signal)
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def stop(self) -> None:
        """Ends the watch; from now on the others may end."""
        self._stopped.set()

    def fail(self, error: BaseException) -> None:
        """Lets the others know that this rank has failed."""
        # From here on, a signal would keep it from reporting why.
        self._has_failed = True
        self._stopped.set()
        if not isinstance(error, RankLostError):
            self._set("failed", str(self._number))

    def reports(self, error: BaseException) -> bool:
        """Whether this rank is the one to report a failure of them all; waits if another one is more likely to."""
        time.sleep(self._patience(error))
        return self._claims_report(error)

    def _patience(self, error: BaseException) -> float:
        """Seconds in which another rank may report a failure."""
        return REPORT_SECONDS * ((self._number > 0) + isinstance(error, RankLostError))

    def _claims_report(self, error: BaseException) -> bool:
        try:
            return bool(self._store.add("reported", 1) == 1)
        except dist.DistError:
            # The first rank held the store, and has ended without a word.
            return self._number == 1 or not isinstance(error, RankLostError)

    def wait_for_others(self) -> None:
        """Keeps the store alive until the others have ended, or for a while."""
        deadline = time.monotonic() + REPORT_SECONDS + GRACE_SECONDS
        try:
            self._store.add("ended", 1)
            while self._number == 0 and time.monotonic() < deadline:
                if self._store.add("ended", 0) >= self._size:
                    return
                time.sleep(0.1)
        except dist.DistError:
            return

    def _set(self, name: str, value: str) -> None:
        try:
            self._store.set(name, value)
        except dist.DistError:
            # The rank that held the store has ended, and this one is about to.
            return

    def _run(self) -> None:
        last: dict[int, tuple[bytes, float]] = {}
        while not self._stopped.wait(PERIOD_SECONDS):
            try:
                reason = self._look(last)
            except dist.DistError:
                reason = "the connection to the first rank is lost"
            if reason is not None and not self._stopped.is_set():
                self._end(reason)
                return

    def _look(self, last: dict[int, tuple[bytes, float]]) -> str | None:
        """Shows that this rank is alive, and looks at the others; returns what has happened to one of them."""
        self._store.add(_alive(self._number), 1)
        if self._store.check(["failed"]):
            return f"rank {self._store.get('failed').decode()} has failed"
        known = [rank for rank in range(self._size) if self._store.check([_alive(rank)])]
        now = time.monotonic()
        for rank in known:
            value = self._store.get(_alive(rank))
            if rank not in last or last[rank][0] != value:
                last[rank] = value, now
            elif now - last[rank][1] > SILENCE_SECONDS:
                return f"rank {rank} has been silent for {SILENCE_SECONDS:.0f} s"
        return None

    def _end(self, reason: str) -> None:
        """Interrupts the main thread; ends the process if that hangs."""
        self._lost = reason
        os.kill(os.getpid(), signal.SIGTERM)
        error = RankLostError(reason)
        # The main thread may take a while to come out of what it did; then it is the one to report.
        if self._stopped.wait(GRACE_SECONDS + self._patience(error)):
            return
        if self._claims_report(error):
            _print_error(error)
        os._exit(1)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Launchers send it to all ranks when one of them has ended; once is enough.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if is_stopping() or self._has_failed:
            return
        raise RankLostError(self._lost or "the launcher has ended this rank, as it does when another one has failed")


def _connect() -> Store:
    """Another connection to the store through which the ranks have met."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=MEETING)


def _alive(number: int) -> str:
    return f"alive-{number}"


def _print_error(error: HcsmoeError) -> None:
    """Prints an error where the main thread no longer can."""
    assert sys.__stderr__ is not None
    sys.__stderr__.write(f"Error: {error.message}\nHint: {error.hint}\n")
    sys.__stderr__.flush()
