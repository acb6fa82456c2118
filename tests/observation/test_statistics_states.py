"""Conversions from the hidden states in a statistics file have the bytes of direct ones."""

import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from held_out_text import held_out_ids, hold_out
from quantized_models import deepseek_fp8
from tiny_models import build, contents, refuse, token_ids

import hcsmoe_hub.pipeline.run
from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, convert, plan
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.convert import execute as run_plan
from hcsmoe_hub.errors import CalibrationError, PlanError
from hcsmoe_hub.observation.statistics_file import CONTENT, TEXT, StatisticsFile
from hcsmoe_hub.observation.watcher import BlockWatcher
from hcsmoe_hub.options import Budget, Layout, Method, Preset, Propagate, Refit
from hcsmoe_hub.planning.estimate import estimate_needs
from hcsmoe_hub.planning.make import make_plan
from hcsmoe_hub.report import ConversionReport

# Fewer than there are, so that a fit to the sample would be another one.
FEATURE_TOKENS = 24
DEFAULT = MethodOptions()
CONVERSIONS: dict[str, tuple[int, MethodOptions]] = {
    "default": (4, DEFAULT),
    "fewer experts": (3, DEFAULT),
    "as published": (4, MethodOptions(preset=Preset.HC_SMOE)),
    "pruned and refitted": (5, MethodOptions(method=Method.PRUNE, refit=Refit.DOWN)),
}


@dataclass(frozen=True)
class Collected:
    """A source, its token ids, and the folder of its statistics file."""

    source: Path

    @property
    def file(self) -> Path:
        return self.source.parent / "statistics"

    def options(self, experts: int, method: MethodOptions, output: Path, **others: Any) -> ConvertOptions:
        ids = CalibrationOptions(dataset=str(self.source.parent / "ids.npy"), feature_tokens=FEATURE_TOKENS)
        return ConvertOptions(experts=experts, method=method, calibration=ids, output=output, **others)


def weights(folder: Path) -> dict[str, bytes]:
    """Everything that a result consists of but its report and card, which name times and places."""
    found = contents(folder)
    assert found.pop("hcsmoe.json")
    assert found.pop("README.md")
    assert "config.json" in found
    return found


def outcome(report: ConversionReport) -> tuple[Any, ...]:
    return report.layers, report.measured, report.calibration, report.method


SOURCES: dict[str, Callable[[Path], Path]] = {
    "mixtral": lambda folder: build(folder, num_hidden_layers=3),
    "deepseek_v3 in FP8": deepseek_fp8,
}


@pytest.fixture(scope="module", params=SOURCES)
def collected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collected]:
    """A source whose conversions hold some text out; its first conversion to four experts has written a file."""
    folder = tmp_path_factory.mktemp("collected")
    found = Collected(SOURCES[request.param](folder / "model"))
    np.save(folder / "ids.npy", token_ids(8, 32).numpy())
    with pytest.MonkeyPatch.context() as patch:
        hold_out(patch, held_out_ids(length=32))
        convert(found.source, found.options(4, DEFAULT, folder / "first", statistics=found.file))
        yield found


def no_run(*_args: Any, **_kwargs: Any) -> None:
    raise AssertionError("the source must not run on calibration text")


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_from_a_file_has_the_bytes_of_a_direct_one(
    collected: Collected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    experts, method = CONVERSIONS[name]
    direct = convert(collected.source, collected.options(experts, method, tmp_path / "direct"))
    monkeypatch.setattr(BlockWatcher, "watching", no_run)
    monkeypatch.setattr(hcsmoe_hub.pipeline.run, "load_tokens", no_run)
    asked = collected.options(experts, method, tmp_path / "recalled", statistics=collected.file)
    assert plan(collected.source, asked).warnings == plan(collected.source, replace(asked, statistics=None)).warnings
    recalled = convert(collected.source, asked)
    assert weights(tmp_path / "recalled") == weights(tmp_path / "direct")
    assert recalled.measured is not None
    assert outcome(recalled) == outcome(direct)
    if name == "default":
        # Writing a file has no part in the result either.
        assert weights(tmp_path / "direct") == weights(collected.file.parent / "first")


def test_the_plan_says_how_large_the_file_will_be(collected: Collected, tmp_path: Path) -> None:
    planned = plan(collected.source, collected.options(4, DEFAULT, tmp_path / "result", statistics=tmp_path / "file"))
    expected = estimate_needs(planned).statistics_bytes
    # Of the tiny tensors, headers are a large part.
    assert collected.file.stat().st_size / 2 < expected < collected.file.stat().st_size
    reused = plan(collected.source, collected.options(4, DEFAULT, tmp_path / "result", statistics=collected.file))
    assert estimate_needs(reused).statistics_bytes == 0


# Files with less in them


@pytest.fixture
def mixtral(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Collected:
    np.save(tmp_path / "ids.npy", token_ids(8, 32).numpy())
    hold_out(monkeypatch, held_out_ids(length=32))
    return Collected(build(tmp_path / "model"))


def test_without_hidden_states_a_fit_runs_the_source_again_and_gives_the_same_bytes(mixtral: Collected) -> None:
    folder = mixtral.source.parent
    first = mixtral.options(4, DEFAULT, folder / "first", statistics=mixtral.file, keep_states=False)
    convert(mixtral.source, first)
    assert not StatisticsFile(mixtral.file).has_states
    before = mixtral.file.read_bytes()
    again = replace(first, output=folder / "again")
    (note,) = plan(mixtral.source, again).warnings
    assert note == f"{mixtral.file} was collected without hidden states, so the source runs on its text again."
    convert(mixtral.source, again)
    assert weights(folder / "again") == weights(folder / "first")
    assert mixtral.file.read_bytes() == before


def test_without_hidden_states_what_needs_only_sums_runs_no_layer_of_the_source(
    mixtral: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, folder = MethodOptions(preset=Preset.REAP), mixtral.source.parent
    first = mixtral.options(4, method, folder / "first", statistics=mixtral.file, keep_states=False)
    direct = convert(mixtral.source, first)
    monkeypatch.setattr(BlockWatcher, "watching", no_run)
    recalled = convert(mixtral.source, replace(first, output=folder / "again"))
    assert weights(folder / "again") == weights(folder / "first")
    assert recalled.measured == direct.measured


def as_before(path: Path) -> None:
    """Takes out of a file what earlier versions did not keep."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    described = json.loads(members.pop(CONTENT))
    del described["text"], described["states_dtype"], members[TEXT]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if not name.startswith("states-"):
                archive.writestr(name, content)
        archive.writestr(CONTENT, json.dumps(described))


def test_a_file_of_an_earlier_version_serves_what_it_did_and_says_what_it_lacks(mixtral: Collected) -> None:
    folder = mixtral.source.parent
    convert(mixtral.source, mixtral.options(4, DEFAULT, folder / "first", statistics=mixtral.file))
    as_before(mixtral.file)
    asked = mixtral.options(4, DEFAULT, folder / "again", statistics=mixtral.file)
    stepping_down, sample = plan(mixtral.source, asked).warnings
    assert stepping_down.startswith("hc-refit converts with `propagate='original'` here: ")
    assert sample.startswith(f"{mixtral.file} has no hidden states, as an earlier version collected it")
    report = convert(mixtral.source, asked)
    assert report.not_measured == "the statistics file is of an earlier version, which kept no text"
    assert {layer.measured_tokens for layer in report.layers} == {FEATURE_TOKENS}
    for method in (MethodOptions(propagate=Propagate.MERGED), MethodOptions(refit=Refit.MODEL)):
        error = refuse(mixtral.source, PlanError, replace(asked, method=method))
        assert "runs the reduced model on the calibration text, which" in error.message
        assert error.hint.startswith("name another file to collect statistics again, or use ")


@pytest.mark.parametrize("member", ["states-1/input-0.safetensors", "states-1/output-0.safetensors", TEXT])
def test_damaged_states_are_refused_and_leave_no_result(mixtral: Collected, member: str) -> None:
    folder = mixtral.source.parent
    convert(mixtral.source, mixtral.options(4, DEFAULT, folder / "first", statistics=mixtral.file))
    with zipfile.ZipFile(mixtral.file) as archive:
        place = archive.getinfo(member).header_offset + 500
    content = bytearray(mixtral.file.read_bytes())
    content[place] ^= 1
    mixtral.file.write_bytes(content)
    with pytest.raises(CalibrationError, match="is not a statistics file of hcsmoe: Bad CRC-32"):
        convert(mixtral.source, mixtral.options(3, DEFAULT, folder / "again", statistics=mixtral.file))
    # Layers before the damaged one may be kept; nothing looks like a result.
    assert {path.name for path in (folder / "again").glob("*")} <= {"hcsmoe.incomplete"}


# The whole model


def test_the_whole_model_is_trained_on_the_text_of_a_file(mixtral: Collected) -> None:
    method, folder = MethodOptions(refit=Refit.MODEL), mixtral.source.parent
    first = convert(mixtral.source, mixtral.options(4, method, folder / "first", statistics=mixtral.file))
    again = convert(mixtral.source, mixtral.options(4, method, folder / "again", statistics=mixtral.file))
    assert weights(folder / "again") == weights(folder / "first")
    assert again.measured == first.measured
    assert again.measured is not None


def test_a_budget_that_depends_on_statistics_is_fitted_to_all_tokens(mixtral: Collected) -> None:
    method = MethodOptions(preset=Preset.HC_REFIT, layout=Layout.MAPPED, budget=Budget.FREQUENCY)
    folder, reports = mixtral.source.parent, []
    for name, file in (("direct", None), ("first", mixtral.file), ("again", mixtral.file)):
        reports.append(convert(mixtral.source, mixtral.options(4, method, folder / name, statistics=file)))
    assert weights(folder / "direct") == weights(folder / "first") == weights(folder / "again")
    assert {layer.measured_tokens for report in reports for layer in report.layers} == {8 * 32}


def test_a_machine_that_computes_in_another_dtype_gets_hidden_states_in_its_own(mixtral: Collected) -> None:
    folder = mixtral.source.parent
    source = Collected(build(folder / "in bfloat16", dtype=torch.bfloat16))
    wide = make_plan(LocalSource(source.source), source.options(4, DEFAULT, folder / "result"), compute=torch.float32)
    run_plan(replace(wide, options=replace(wide.options, statistics=source.file)))
    asked = source.options(4, DEFAULT, folder / "again", statistics=source.file)
    narrow = make_plan(LocalSource(source.source), asked, compute=torch.bfloat16)
    assert [note.partition(" were")[2] for note in narrow.warnings] == [
        " computed in float32, but this machine computes in bfloat16: the result differs a little from that of a "
        "direct conversion."
    ]
    states = StatisticsFile(source.file).states(0, narrow.model.skeleton.dtype)
    assert {states.output_BSH.dtype, states.calls[0].args[0].dtype} == {torch.bfloat16}
