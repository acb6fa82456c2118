"""The pretended accelerator itself."""

from collections.abc import Callable
from typing import Any


def test_the_pretended_accelerator_refuses_counts_and_runs_out_as_cuda_does(ask: Callable[..., Any]) -> None:
    assert ask("rules") == []
