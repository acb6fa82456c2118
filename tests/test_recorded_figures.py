"""The tables of ``benchmarks/README.md`` say what the scripts have recorded."""

import importlib
import json
import re
from typing import Any

import pytest
from places import ROOT

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    speed, scaling = map(importlib.import_module, ("speed", "scaling"))

TABLES = (ROOT / "benchmarks" / "README.md").read_text("utf-8")


def recorded(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / name).read_text("utf-8"))
    return found


@pytest.mark.parametrize("name", recorded("recover.json")["rows"])
def test_a_row_about_recovery_is_that_of_its_run(name: str) -> None:
    row = recorded("recover.json")["rows"][name]
    source, before, after = (row[f"test_{when}"] for when in ("source", "before", "after"))
    held_before, held_after = (row[f"held_out_{when}"]["perplexity"] for when in ("before", "after"))
    cells = [
        row["start"],
        f"{source:.2f}",
        f"{before:.2f} ({held_before:.2f})",
        f"{after:.2f} ({held_after:.2f})",
        f"{100 * (before - after) / (before - source):.0f} %",
        str(row["steps"]),
        f"{row['tokens'] / 1000:,.0f} k",
    ]
    assert f"| {' | '.join(cells)} |" in TABLES


def rate(figures: dict[str, Any], batch: int, part: str) -> str:
    spread = figures["throughput"][str(batch)][part]["tokens_per_second"]
    digits = 0 if spread["median"] >= 100 else 1
    return "{median:,.{d}f} ({min:,.{d}f} to {max:,.{d}f})".format(**spread, d=digits)


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("part", ["prefill", "decode"])
def test_a_row_about_throughput_is_that_of_its_run(part: str, batch: int) -> None:
    sides = [side for pair in recorded("cost.json")["models"].values() for side in (pair["base"], pair["model"])]
    (row,) = (line for line in TABLES.splitlines() if re.match(rf"\| {part}, batch {batch}\b", line))
    assert row.split(" | ", 1)[1] == " | ".join(rate(side, batch, part) for side in sides) + " |"


def test_operations_are_those_of_the_run_and_those_counted_by_hand() -> None:
    sides = [side for pair in recorded("cost.json")["models"].values() for side in (pair["base"], pair["model"])]
    for part, start in (("prefill", "| FLOPs per token, prompt"), ("decode", "| FLOPs per token, after")):
        (row,) = (line for line in TABLES.splitlines() if line.startswith(start))
        assert row.split(" | ", 1)[1] == " | ".join(f"{side[f'{part}_flops'] / 1e6:.2f} M" for side in sides) + " |"
        assert all(side[f"{part}_flops"] == side["by_hand"][part] for side in sides)


@pytest.mark.parametrize(
    "result", recorded("speed.json")["results"], ids=lambda found: f"{found['model']}-{found['preset']}"
)
def test_a_row_about_speed_is_that_of_its_run(result: dict[str, Any]) -> None:
    assert speed.row(result) in TABLES


@pytest.mark.parametrize(
    "result", recorded("scaling.json")["results"], ids=lambda found: f"{found['axis']}-{found['value']}"
)
def test_a_row_about_scaling_is_that_of_its_run(result: dict[str, Any]) -> None:
    assert scaling.row(result["axis"], result["value"], result) in TABLES


@pytest.mark.parametrize("name", ["example", "sharded"])
def test_every_killed_conversion_ended_in_the_same_bytes(name: str) -> None:
    found = recorded("kills.json")["models"][name]
    assert found["identical"] == found["runs"] == len(found["records"])
    assert f"{found['runs']} of {found['runs']}" in TABLES


@pytest.mark.parametrize(
    "found", recorded("device_counts.json")["counts"], ids=lambda found: f"{found['model']}-{found['recipe']}"
)
def test_a_row_about_an_accelerator_is_that_of_its_count(found: dict[str, Any]) -> None:
    planned, peak, up, down = (
        f"{found[name] / 1e9:.1f} GB"
        for name in ("planned_device_bytes", "peak_device_bytes", "bytes_up", "bytes_down")
    )
    cells = [found["model"], found["recipe"], f"{found['tokens'] // 1000}k", planned, peak]
    cells += [f"{found['planned_over_peak']:.2f}", f"{found['launches']:,}", f"{found['waits']:,}", up, down]
    assert f"| {' | '.join(cells)} |" in TABLES
