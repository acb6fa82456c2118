"""An accelerator whose memory ends: the result is the same, or there is one message."""

from collections.abc import Callable
from typing import Any

import pytest
from accelerator.cases import SCARCE

# Of every recipe; `every_allocation.py` tries all of them.
ALLOCATIONS = 12
SHARES = (1.1, 0.9, 0.7, 0.5, 0.3)


def is_good(verdict: str) -> bool:
    """Whether a conversion gave the labels of the host, or said what to do."""
    return verdict == "done" or (verdict.startswith("message: ") and not verdict.endswith(" | None"))


@pytest.mark.parametrize("recipe", SCARCE)
def test_memory_may_end_at_any_allocation(ask: Callable[..., Any], recipe: str) -> None:
    count = ask("allocations", recipe=recipe)["allocations"]
    tried = sorted({1 + number * (count - 1) // (ALLOCATIONS - 1) for number in range(ALLOCATIONS)})
    found = {number: ask("fail", recipe=recipe, allocation=number) for number in tried}
    assert {number: verdict for number, verdict in found.items() if not is_good(verdict)} == {}


@pytest.mark.parametrize("recipe", SCARCE)
def test_an_accelerator_of_any_size_finishes_or_says_what_to_do(ask: Callable[..., Any], recipe: str) -> None:
    peak = ask("allocations", recipe=recipe)["peak"]
    found = {share: ask("limit", recipe=recipe, capacity=int(peak * share)) for share in SHARES}
    assert {share: verdict for share, verdict in found.items() if not is_good(verdict)} == {}
    assert found[1.1] == "done"
