"""What a request to stop does: Ctrl-C, ``SIGTERM`` from a scheduler, ``SIGHUP`` from a terminal that is closed."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Set once the main thread has been asked to stop, and cleans up.
_is_stopping = threading.Event()
# The exit code of a command that was stopped, whatever stopped it.
STOPPED = 130


@contextmanager
def stopping_cleanly(on_second: Callable[[], None]) -> Iterator[None]:
    """Raises ``KeyboardInterrupt`` at the first request to stop; a second one ends the process at once.

    Args:
        on_second: Called before the process ends; what it was about to remove stays behind.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _is_stopping.clear()

    def stop(number: int, frame: FrameType | None) -> None:
        if _is_stopping.is_set():
            on_second()
            os._exit(STOPPED)
        _is_stopping.set()
        raise KeyboardInterrupt

    # What the caller ignores, as nohup does, or handles itself stays as it is.
    usual = {signal.SIG_DFL, signal.default_int_handler}
    earlier = _replaced({number: stop for number in STOPPING if signal.getsignal(number) in usual})
    try:
        yield
    finally:
        # The last threads of a process that stops may take a while, and a second request must not meet a usual handler.
        if not _is_stopping.is_set():
            _replaced(earlier)


def is_stopping() -> bool:
    """Whether this process has been asked to stop, and cleans up."""
    return _is_stopping.is_set()


@contextmanager
def signals_held() -> Iterator[None]:
    """Lets requests to stop wait until a ``with`` block is over, which must be short."""
    if threading.current_thread() is not threading.main_thread():
        # Signals only interrupt the main thread.
        yield
        return
    arrived: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    ignored = {None, signal.SIG_IGN}
    earlier = _replaced({number: hold for number in STOPPING if signal.getsignal(number) not in ignored})
    try:
        yield
    finally:
        _replaced(earlier)
        if arrived:
            signal.raise_signal(arrived[0])


def _replaced(handlers: dict[signal.Signals, Any]) -> dict[signal.Signals, Any]:
    """Sets handlers, and returns those that were there before."""
    return {number: signal.signal(number, handler) for number, handler in handlers.items()}
