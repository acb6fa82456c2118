"""Conversions and evaluations give on the accelerator what they give on the host."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from accelerator.cases import CONVERSIONS, MISTAKES

# Rounding that gradient descent follows.
FURTHEST = 2e-2


@pytest.mark.parametrize("case", CONVERSIONS)
def test_a_conversion_is_that_of_the_host(ask: Callable[..., Any], case: str) -> None:
    found = ask("convert", case=case)
    assert found["labels"]
    assert found["names"]
    assert found["furthest"] < FURTHEST
    assert found["launches"] > 100


@pytest.mark.parametrize("stream", [False, True], ids=["loaded", "streamed"])
def test_an_evaluation_is_that_of_the_host(ask: Callable[..., Any], stream: bool) -> None:
    found = ask("evaluate", stream=stream)
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-3)
    assert len(found["cpu"]) > 10


def test_a_curve_is_that_of_the_host(ask: Callable[..., Any]) -> None:
    found = ask("curve")
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-3)
    assert len(found["cpu"]) > 10


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found_with_its_line(ask: Callable[..., Any], name: str) -> None:
    assert re.match(
        rf"{MISTAKES[name][-1]}:\d+: Expected all tensors to be on the same device", ask("mistake", name=name)
    )
