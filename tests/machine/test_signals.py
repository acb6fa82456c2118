"""A request to stop ends a command cleanly, a second one at once, and none in the middle of what must not be cut."""

import os
import signal
import subprocess
import sys

import pytest

from hcsmoe_hub.machine.signals import STOPPED, STOPPING, signals_held

START = """
import os, signal, sys, time
from hcsmoe_hub.machine.signals import signals_held, stopping_cleanly
def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)
"""
ONCE = """
try:
    with stopping_cleanly(lambda: print("second", flush=True)):
        send(int(sys.argv[1]))
except KeyboardInterrupt:
    print("stopped", flush=True)
"""
TWICE = """
with stopping_cleanly(lambda: print("second", flush=True)):
    try:
        send(int(sys.argv[1]))
    finally:
        send(signal.SIGTERM)
        print("cleaned up", flush=True)
"""
HELD = """
try:
    with stopping_cleanly(lambda: None):
        with signals_held():
            send(int(sys.argv[1]))
            print("done", flush=True)
        print("too late", flush=True)
except KeyboardInterrupt:
    print("stopped", flush=True)
"""
IGNORED = """
signal.signal(int(sys.argv[1]), signal.SIG_IGN)
with stopping_cleanly(lambda: None), signals_held():
    send(int(sys.argv[1]))
print("not stopped", flush=True)
"""


def outcome(code: str, number: signal.Signals) -> tuple[int, str, str]:
    """Exit code and output of a program that is sent a signal."""
    words = [sys.executable, "-c", START + code, str(int(number))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_every_request_to_stop_is_an_interrupt(number: signal.Signals) -> None:
    assert outcome(ONCE, number) == (0, "stopped\n", "")


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_a_second_request_ends_at_once_without_a_traceback(number: signal.Signals) -> None:
    assert outcome(TWICE, number) == (STOPPED, "second\n", "")


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_a_request_waits_for_what_must_not_be_cut(number: signal.Signals) -> None:
    assert outcome(HELD, number) == (0, "done\nstopped\n", "")


def test_what_the_caller_ignores_stays_ignored() -> None:
    assert outcome(IGNORED, signal.SIGHUP) == (0, "not stopped\n", "")


def test_a_library_user_keeps_the_usual_interrupt() -> None:
    before = [signal.getsignal(number) for number in STOPPING]
    done = list[int]()

    def work() -> None:
        with signals_held():
            os.kill(os.getpid(), signal.SIGINT)
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [1]
    assert [signal.getsignal(number) for number in STOPPING] == before
