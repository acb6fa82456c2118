"""How the steps of a recovery grow and shrink, by their number or by the time."""

import pytest

from hcsmoe_hub.recovery import clock as module
from hcsmoe_hub.recovery.clock import Clock


def test_steps_rise_shortly_and_then_fall_to_nearly_nothing():
    clock = Clock(100, None)
    shares = [clock.schedule(step) for step in range(100)]
    top = shares.index(max(shares))
    assert 0 < shares[0] < 0.2
    assert 4 <= top <= 6
    assert max(shares) == pytest.approx(1.0)
    assert shares[:top] == sorted(shares[:top])
    assert shares[top:] == sorted(shares[top:], reverse=True)
    assert shares[-1] < 0.02


def test_time_counts_where_it_is_nearer_to_its_end_than_the_steps_are(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    clock = Clock(100, 1.0)
    clock.go_on(15.0)
    now[0] = 15.0
    clock.look()
    assert clock.share(10) == pytest.approx(0.5)
    assert clock.share(80) == pytest.approx(0.8)
    assert not clock.is_over
    now[0] = 45.0
    assert not clock.is_over, "all processes see what one of them has looked at"
    clock.look()
    assert clock.is_over
    assert clock.share(10) == 1.0
