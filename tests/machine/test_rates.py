"""Rates of this machine: measured once, kept in a file, and never a reason to fail."""

import json
from pathlib import Path

import pytest
import torch
from core_rates import CORE, DISK

from hcsmoe_hub.machine import rates, rates_file
from hcsmoe_hub.machine.rates import (
    ASSUMED_DISK,
    machine_rates,
    measure_disk,
    product_rate,
)

CPU = torch.device("cpu")
DEVICE = CORE.device


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the file, as users name one."""
    folder = tmp_path / "home"
    monkeypatch.setenv("HCSMOE_HOME", str(folder))
    return folder


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured: the probes themselves take seconds."""
    measured: list[str] = []
    monkeypatch.setattr(rates, "measure_device", lambda device: measured.append("device") or DEVICE)
    monkeypatch.setattr(rates, "measure_disk", lambda folder: measured.append("disk") or DISK)
    return measured


def test_rates_are_measured_once_and_then_read_from_the_file(tmp_path: Path, probes: list[str]) -> None:
    first = machine_rates(CPU, source=tmp_path, output=tmp_path)
    assert probes == ["device", "disk"]
    assert machine_rates(CPU, source=tmp_path, output=tmp_path) == first
    assert probes == ["device", "disk"]
    assert first.device == DEVICE
    assert first.source_disk == first.output_disk == DISK


def test_another_number_of_threads_is_another_machine(
    tmp_path: Path, probes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_rates(CPU, source=tmp_path, output=tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 96)
    machine_rates(CPU, source=tmp_path, output=tmp_path)
    assert probes == ["device", "disk", "device"]


@pytest.mark.parametrize("content", ["", "no JSON", "[]", '{"products": 1}'])
def test_a_file_that_is_something_else_is_measured_over(
    home: Path, tmp_path: Path, probes: list[str], content: str
) -> None:
    home.mkdir()
    (home / "rates.json").write_text(content)
    machine_rates(CPU, source=tmp_path, output=tmp_path)
    assert probes == ["device", "disk"]
    assert len(json.loads((home / "rates.json").read_text())) >= 2


def test_rates_that_are_no_rates_are_measured_again(home: Path, tmp_path: Path, probes: list[str]) -> None:
    machine_rates(CPU, source=tmp_path, output=tmp_path)
    kept = json.loads((home / "rates.json").read_text())
    kept[rates_file.device_key(CPU)]["memory"] = -1
    (home / "rates.json").write_text(json.dumps(kept))
    assert machine_rates(CPU, source=tmp_path, output=tmp_path).device == DEVICE
    assert probes == ["device", "disk", "device"]


def test_a_home_that_cannot_be_written_is_no_error(
    home: Path, tmp_path: Path, probes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home.write_text("a file where the folder would be")
    assert machine_rates(CPU, source=tmp_path, output=tmp_path).device == DEVICE
    assert home.read_text() == "a file where the folder would be"


def test_without_a_home_of_its_own_the_file_is_in_the_cache_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HCSMOE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert rates_file.rates_path() == Path("/caches/hcsmoe/rates.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert rates_file.rates_path() == Path("/home/me/.cache/hcsmoe/rates.json")


def test_a_disk_that_nobody_may_write_to_gets_an_assumed_rate_that_is_not_kept(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "measure_device", lambda device: DEVICE)

    def refuse(**_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert measure_disk(tmp_path) is None
    assert machine_rates(CPU, source=tmp_path, output=tmp_path).output_disk == ASSUMED_DISK
    assert rates_file.disk_key(tmp_path) not in json.loads((home / "rates.json").read_text())


def test_the_probe_of_a_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_DISK_BYTES", 1 << 21)
    found = measure_disk(tmp_path)
    assert found is not None
    assert found.read > 0
    assert found.write > 0
    assert list(tmp_path.iterdir()) == []


def test_the_best_of_several_probes_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([9.0, 0.5, 7.0])
    monkeypatch.setattr(rates, "_seconds", lambda work, device: next(times))
    assert product_rate(CPU, torch.float32) == 2 * 256**3 / 0.5


def test_with_one_thread_the_time_of_the_processor_counts_and_not_what_others_take(
    monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    wall, processor = iter([0.0, 10.0]), iter([0.0, 2.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(wall))
    monkeypatch.setattr("time.process_time", lambda: next(processor))
    assert rates._seconds(lambda: None, CPU) == 2.0
