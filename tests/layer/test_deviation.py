"""How far a converted block is from its source: on how many tokens, and whatever they are cut into."""

from pathlib import Path

import pytest
import torch
from tiny_models import LENGTH, build, options, token_ids

import hcsmoe_hub.layer.deviation
from hcsmoe_hub import convert
from hcsmoe_hub.layer.deviation import relative_error


def test_the_error_is_the_norm_of_the_difference_over_that_of_the_original() -> None:
    old, new = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[3.0, 3.0], [4.0, 4.0]])
    assert relative_error([old], [new]) == 1.0
    assert relative_error([old], [old]) == 0.0
    assert relative_error([torch.zeros(2, 2)], [torch.zeros(2, 2)]) == 0.0


def test_the_error_does_not_depend_on_where_outputs_are_cut() -> None:
    old, new = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))
    assert relative_error(list(old.split(7)), list(new.split(64))) == pytest.approx(relative_error([old], [new]))


@pytest.mark.parametrize(("least", "most", "expected"), [(4, 4096, 16), (64, 4096, 64), (4, 8, 8), (20, 40, 20)])
def test_a_quarter_of_the_tokens_is_compared_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: int, most: int, expected: int
) -> None:
    monkeypatch.setattr(hcsmoe_hub.layer.deviation, "LEAST_TOKENS", least)
    monkeypatch.setattr(hcsmoe_hub.layer.deviation, "MOST_TOKENS", most)
    source = build(tmp_path / "model")
    report = convert(source, options(source, 4, ids=token_ids(64 // LENGTH)))
    assert 64 // LENGTH * LENGTH == 64
    assert {layer.measured_tokens for layer in report.layers} == {expected}
