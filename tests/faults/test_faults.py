"""A disk that fails at any write, fsync or rename of a conversion: nothing looks finished that is not, and it goes on.

`every_fault.py` tries all of them.
"""

from collections.abc import Callable
from typing import Any

import pytest
from faults.every_fault import FAULTS

# Of every variant and kind of fault, counted from its end, where results are moved, and spread over the rest.
SPREAD, LAST = 2, 2
VARIANTS = {
    "plain": ("full", "killed", "short"),
    "overwrite": ("broken", "torn"),
    "statistics": ("dead",),
}


def tried(calls: int, kind: int) -> list[int]:
    """Numbers of the calls that fail, different ones for every kind of fault."""
    step = calls // (SPREAD + 1)
    spread = [1 + kind + step * number for number in range(SPREAD)]
    return sorted({*spread, *(calls - 12 * number - kind for number in range(1, LAST + 1))})


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_disk_may_fail_at_any_call(ask: Callable[..., Any], variant: str) -> None:
    calls, found = ask("calls", variant=variant), {}
    for kind, fault in enumerate(VARIANTS[variant]):
        error, how = FAULTS[fault]
        for at in tried(calls, kind):
            found[fault, at] = ask("fail", variant=variant, at=at, error=error, how=int(how))
    assert {key: end for key, end in found.items() if end["wrong"]} == {}
    assert all(end["end"].startswith("0") for (fault, _), end in found.items() if fault == "short")
    assert any(not end["end"].startswith("0") for end in found.values())
