"""Peaks of memory are those of one conversion, not of all that a process has done."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_models import build, options

from hcsmoe_hub import convert
from hcsmoe_hub.errors import OutOfMemoryError
from hcsmoe_hub.machine.device import measuring_memory, peak_memory
from hcsmoe_hub.machine.memory import resident_peak

HOST = torch.device("cpu")
MUCH = 400_000_000


def hold_much() -> None:
    torch.ones(MUCH, dtype=torch.uint8).sum()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux starts a new peak")
def test_a_peak_is_measured_anew() -> None:
    hold_much()
    before = resident_peak()
    with measuring_memory(HOST):
        assert peak_memory(HOST)["process"] < before - MUCH // 2
        hold_much()
        assert peak_memory(HOST)["process"] > before - MUCH // 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux starts a new peak")
def test_a_second_conversion_reports_its_own_peak(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    hold_much()
    before = resident_peak()
    report = convert(source, options(source, 4))
    assert 0 < report.peak_memory_bytes["process"] < before - MUCH // 2


def test_a_conversion_whose_memory_runs_out_ends_in_one_message_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build(tmp_path / "model")
    wanted = options(source, 4)
    before = sorted(tmp_path.iterdir())

    def exhausted(*_: object) -> None:
        torch.empty(1 << 55, dtype=torch.uint8)

    monkeypatch.setattr("hcsmoe_hub.layer.reducer.LayerReducer.reduce", lambda *args, **kwargs: exhausted())
    with pytest.raises(OutOfMemoryError) as caught:
        convert(source, wanted)
    assert caught.value.message.startswith("memory ran out in layer 0 (convert): 36028.8 TB more were needed, but ")
    assert "`batch_tokens`" in caught.value.hint
    assert "`device='cpu'`" not in caught.value.hint
    assert sorted(tmp_path.iterdir()) == before
