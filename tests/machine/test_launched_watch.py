"""What watches the other ranks of a launched command, in a process that is the only rank."""

import os
import signal
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist
from launched_ranks import free_port

from hcsmoe_hub.machine.launched import Watch
from hcsmoe_hub.machine.ranks import RankLostError


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    port, earlier = free_port(), signal.getsignal(signal.SIGTERM)
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=1))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    found = Watch(0, 1)
    yield found
    found.stop()
    signal.signal(signal.SIGTERM, earlier)
    del store


def test_a_signal_of_the_launcher_ends_a_rank(watch: Watch) -> None:
    with pytest.raises(RankLostError, match="the launcher has ended this rank"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_does_not_keep_a_rank_that_has_failed_from_reporting_why(watch: Watch) -> None:
    error = RankLostError("the connection to another rank is lost")
    watch.fail(error)
    os.kill(os.getpid(), signal.SIGTERM)
    assert watch.reports(error)


def test_a_failure_is_reported_once(watch: Watch) -> None:
    error = ValueError()
    watch.fail(error)
    assert [watch.reports(error) for _ in range(2)] == [True, False]
