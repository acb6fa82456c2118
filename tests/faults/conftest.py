"""A process in which disks fail for every file of tests."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[..., Any]]:
    """Asks the process for something and returns its answer."""
    from faults.ask import asking
    from faults.disk import missing_tool

    missing = missing_tool()
    if missing is not None:
        pytest.skip(f"the failing disk is compiled, and this machine lacks {missing}")
    with asking() as request:
        yield request
