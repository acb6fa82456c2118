"""Statistics in a file: what was observed once serves every later conversion, of the same source only."""

import errno
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import save_tiny
from safetensors.torch import load, save
from tiny_models import build, change_tensors, contents, options, refuse, token_ids

import hcsmoe_hub.layer.reducer
from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, convert
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import CalibrationError, PlanError
from hcsmoe_hub.model.source_model import read_model
from hcsmoe_hub.observation.statistics_file import CONTENT, StatisticsFile, fingerprint
from hcsmoe_hub.options import (
    Align,
    Budget,
    Clustering,
    Distance,
    Dominant,
    Features,
    Layout,
    Merge,
    Preset,
    Saliency,
    Similarity,
)

# Fewer than there are, so that the sample matters.
FEATURE_TOKENS = 24


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Mixtral, its calibration tokens, statistics, and the conversion that made them."""
    folder = tmp_path_factory.mktemp("collected")
    source = build(folder / "model")
    convert(source, wanted(folder, statistics=folder / "statistics"))
    return folder


@pytest.fixture
def folder(collected: Path, tmp_path: Path) -> Path:
    """A copy of that folder without the result, for tests that change something."""
    copy = tmp_path / "collected"
    shutil.copytree(collected, copy, ignore=shutil.ignore_patterns("result"))
    return copy


def wanted(folder: Path, experts: int = 4, **others: Any) -> ConvertOptions:
    """Options of a conversion of the model of a folder, on its tokens."""
    found = options(folder / "model", experts, **others)
    return replace(found, calibration=replace(found.calibration, feature_tokens=FEATURE_TOKENS))


def reusing(folder: Path, experts: int = 4, **others: Any) -> ConvertOptions:
    """Options of a conversion from the statistics of a folder, which say what they were collected on."""
    return ConvertOptions(experts=experts, output=folder / "result", statistics=folder / "statistics", **others)


def files(folder: Path) -> dict[str, bytes]:
    """Everything that a result consists of but its report and card, whose errors are measured on other tokens."""
    found = contents(folder)
    assert found.pop("hcsmoe.json")
    assert found.pop("README.md")
    return found


# What is in a file


def test_two_runs_of_a_model_write_the_same_bytes(collected: Path, tmp_path: Path) -> None:
    # Neither K nor the method nor the layout has a part in it.
    method = MethodOptions(merge=Merge.AVERAGE, layout=Layout.FULL)
    again, result = tmp_path / "again", tmp_path / "result"
    convert(collected / "model", wanted(collected, 6, statistics=again, output=result, method=method))
    assert again.read_bytes() == (collected / "statistics").read_bytes()


def test_nothing_but_the_statistics_is_left_next_to_the_result(collected: Path) -> None:
    assert {path.name for path in collected.iterdir()} == {"model", "ids.npy", "statistics", "result"}


def test_the_file_says_what_was_observed(collected: Path) -> None:
    file = StatisticsFile(collected / "statistics")
    assert file.content["source"] == "model"
    assert file.content["layers"] == [0, 1]
    assert file.content["calibration"]["tokens"] == token_ids().numel()
    assert (file.feature_tokens, file.calibration.dataset) == (FEATURE_TOKENS, "ids.npy")
    sample = file.layer(1).sample
    assert sample is not None
    assert sample.args[0].shape == (1, FEATURE_TOKENS, 32)


# Conversions from a file

METHODS: dict[str, MethodOptions] = {
    "default": MethodOptions(preset=Preset.HC_SMOE),
    "zipit": MethodOptions(merge=Merge.ZIPIT),
    "fix-dom": MethodOptions(merge=Merge.FIX_DOM, features=Features.ACTIVATION_WEIGHT),
    "align": MethodOptions(align=Align.ACTIVATION, merge=Merge.SALIENCY, dominant=Dominant.ROUTING_SCORE),
    "overlap": MethodOptions(clustering=Clustering.SINGLE_SHOT, distance=Distance.WASSERSTEIN),
    "logits": MethodOptions(similarity=(Similarity.ROUTER_LOGITS, Similarity.EXPERT_OUTPUT)),
    "fuzzy": MethodOptions(clustering=Clustering.FUZZY),
    "reap": MethodOptions(preset=Preset.REAP),
    "gram": MethodOptions(preset=Preset.REAP, saliency=Saliency.GRAM),
    "man": MethodOptions(preset=Preset.REAP, saliency=Saliency.MAN),
    "reconstruction": MethodOptions(preset=Preset.REAP, saliency=Saliency.RECONSTRUCTION),
    "mapped": MethodOptions(layout=Layout.MAPPED),
    "budget": MethodOptions(layout=Layout.FULL, budget=Budget.FREQUENCY),
}


def no_run(*_args: Any, **_kwargs: Any) -> None:
    raise AssertionError("the model must not run")


@pytest.mark.parametrize("experts", [3, 5])
@pytest.mark.parametrize("name", METHODS)
def test_a_conversion_from_a_file_is_the_direct_one_without_running_the_model(
    collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, experts: int
) -> None:
    direct, recalled = tmp_path / "direct", tmp_path / "recalled"
    first = convert(collected / "model", wanted(collected, experts, output=direct, method=METHODS[name]))
    monkeypatch.setattr("hcsmoe_hub.pipeline.stream.stream", no_run)
    monkeypatch.setattr("hcsmoe_hub.calibration.text.load_calibration", no_run)
    again = convert(collected / "model", replace(reusing(collected, experts, method=METHODS[name]), output=recalled))
    assert files(recalled) == files(direct)
    assert (again.calibration, again.method) == (first.calibration, first.method)
    for one, other in zip(first.layers, again.layers, strict=True):
        assert (one.labels, one.dominant, one.usage) == (other.labels, other.dominant, other.usage)
        assert (one.saliency, one.routing_score) == (other.saliency, other.routing_score)
        # Without a file, a budget that needs statistics leaves the second pass a sample.
        tokens = FEATURE_TOKENS if name == "budget" else token_ids().numel()
        assert (one.measured_tokens, other.measured_tokens) == (tokens, token_ids().numel())


@pytest.mark.parametrize("name", ["default", "reap", "mapped"])
def test_errors_measured_on_a_sample_of_all_tokens_are_those_of_all_tokens(tmp_path: Path, name: str) -> None:
    source, file = build(tmp_path / "model"), tmp_path / "statistics"
    asked = options(source, 4, statistics=file, method=METHODS[name], keep_states=False)
    direct = convert(source, asked)
    recalled = convert(source, replace(asked, overwrite=True))
    for one, other in zip(direct.layers, recalled.layers, strict=True):
        assert one.measured_tokens == other.measured_tokens == token_ids().numel()
        assert one.router == other.router
        assert other.output_error == pytest.approx(one.output_error, rel=1e-5)
        assert one.output_error > 0.01


def test_statistics_of_a_renamed_source_are_reused(folder: Path) -> None:
    (folder / "model").rename(folder / "renamed")
    report = convert(folder / "renamed", reusing(folder))
    assert report.source["path"] == "renamed"


# Files that do not fit


def test_statistics_of_other_weights_are_refused(folder: Path) -> None:
    name = "model.layers.0.block_sparse_moe.gate.weight"
    change_tensors(folder / "model", lambda tensors: tensors[name].neg_())
    error = refuse(folder / "model", PlanError, reusing(folder))
    assert (
        f"come from {StatisticsFile(folder / 'statistics').content['source']}, whose config or weights" in error.message
    )
    assert "will be written" in error.hint


@pytest.mark.parametrize(
    "change",
    [{"num_experts_per_tok": 1}, {"num_hidden_layers": 3}, {"num_local_experts": 6}, {"rms_norm_eps": 1e-4}],
    ids=str,
)
def test_statistics_of_another_config_are_refused(folder: Path, change: dict[str, Any]) -> None:
    build(folder / "other", **change)
    assert "whose config or weights differ" in refuse(folder / "other", PlanError, reusing(folder)).message


def test_the_fingerprint_is_that_of_the_content_whatever_the_shards(folder: Path) -> None:
    build(folder / "other", max_shard_size="1GB")
    shutil.copytree(folder / "model", folder / "copy")
    prints = {name: fingerprint(read_model(LocalSource(folder / name))) for name in ("model", "other", "copy")}
    assert len(set(prints.values())) == 1


@pytest.mark.parametrize(
    "asked",
    [
        {"dataset": "c4"},
        {"samples": 7},
        {"sequence_length": 9},
        {"text_column": "words"},
        {"feature_tokens": FEATURE_TOKENS + 1},
    ],
    ids=str,
)
def test_other_calibration_options_than_those_of_the_file_are_refused(folder: Path, asked: dict[str, Any]) -> None:
    calibration = CalibrationOptions(**asked)
    error = refuse(folder / "model", PlanError, replace(reusing(folder), calibration=calibration))
    (name, value), words = next(iter(asked.items())), next(iter(asked)).replace("_", " ")
    found = StatisticsFile(folder / "statistics").content["options"][name]
    assert error.message == f"{folder / 'statistics'} was collected with {words} {found}, not {value}."


def test_another_seed_is_that_of_the_method_and_keeps_the_statistics(folder: Path) -> None:
    report = convert(folder / "model", replace(reusing(folder), calibration=CalibrationOptions(seed=1)))
    assert report.calibration["seed"] == 42


def test_the_calibration_options_of_the_file_itself_are_accepted(folder: Path) -> None:
    found = StatisticsFile(folder / "statistics").content["options"]
    report = convert(folder / "model", replace(reusing(folder), calibration=CalibrationOptions(**found)))
    assert report.calibration["dataset"] == found["dataset"]


def test_a_calibration_file_is_known_by_its_content(folder: Path) -> None:
    moved, other = folder / "moved.npy", folder / "other" / "ids.npy"
    shutil.copy(folder / "ids.npy", moved)
    report = convert(folder / "model", replace(reusing(folder), calibration=CalibrationOptions(dataset=str(moved))))
    assert report.calibration["dataset"] == "ids.npy"
    shutil.rmtree(folder / "result")
    other.parent.mkdir()
    np.save(other, token_ids().numpy()[::-1])
    asked = replace(reusing(folder), calibration=CalibrationOptions(dataset=str(other)))
    error = refuse(folder / "model", PlanError, asked)
    assert f"was collected with dataset ids.npy, not {other}." in error.message


def rewrite(path: Path, change: Callable[[dict[str, bytes]], Any]) -> None:
    """Lets ``change`` edit the members of an archive, by name."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def with_content(path: Path, **changes: Any) -> None:
    """Sets keys of what a file says about itself."""
    rewrite(
        path, lambda members: members.update({CONTENT: json.dumps(json.loads(members[CONTENT]) | changes).encode()})
    )


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: path.write_text("mine"),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "folder": make_folder,
    "another archive": lambda path: rewrite(path, lambda members: members.pop(CONTENT)),
    "no JSON": lambda path: rewrite(path, lambda members: members.update({CONTENT: b"{"})),
    "no text": lambda path: rewrite(path, lambda members: members.update({CONTENT: b"\xff\xfe\xff"})),
    "a list": lambda path: rewrite(path, lambda members: members.update({CONTENT: b"[]"})),
    "another format": lambda path: with_content(path, format="npz"),
    "nothing but a format": lambda path: rewrite(
        path, lambda members: members.update({CONTENT: b'{"format": "hcsmoe-statistics", "version": 1}'})
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_no_statistics_file_is_refused_and_stays(folder: Path, damage: str) -> None:
    DAMAGES[damage](folder / "statistics")
    error = refuse(folder / "model", CalibrationError, reusing(folder))
    assert f"{folder / 'statistics'} is not a statistics file of hcsmoe: " in error.message


def as_before(members: dict[str, bytes]) -> None:
    """Takes out what earlier versions did not observe."""
    for name in [name for name in members if name.startswith("layer-")]:
        tensors = load(members[name])
        members[name] = save({key: tensors[key] for key in tensors.keys() - {"mass_E", "norm_E", "gram_EE"}})


def test_a_file_of_an_earlier_version_serves_the_scores_that_it_holds(folder: Path) -> None:
    method = MethodOptions(preset=Preset.REAP)
    expected = convert(folder / "model", reusing(folder, method=method))
    shutil.rmtree(folder / "result")
    rewrite(folder / "statistics", as_before)
    found = convert(folder / "model", reusing(folder, method=method))
    assert [layer.labels for layer in found.layers] == [layer.labels for layer in expected.layers]


@pytest.mark.parametrize("saliency", [Saliency.GRAM, Saliency.OMP, Saliency.MAN, Saliency.TOTAL_MASS])
def test_a_file_of_an_earlier_version_is_refused_for_what_it_does_not_hold(folder: Path, saliency: Saliency) -> None:
    rewrite(folder / "statistics", as_before)
    asked = reusing(folder, method=MethodOptions(preset=Preset.REAP, saliency=saliency))
    error = refuse(folder / "model", PlanError, asked)
    assert f"was collected by an earlier version, which did not observe what `saliency='{saliency}'`" in error.message
    assert error.hint == "name another file to collect statistics again, or use `saliency='reap'`"


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_another_version_of_the_format_is_refused(folder: Path, version: object) -> None:
    with_content(folder / "statistics", version=version)
    error = refuse(folder / "model", CalibrationError, reusing(folder))
    assert f"has version {version} of its format; this program reads 1" in error.message


def flip(path: Path) -> None:
    """Changes one byte in the middle of the second layer."""
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("layer-1.safetensors").header_offset + 2000
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def without_usage(members: dict[str, bytes]) -> None:
    name = "layer-1.safetensors"
    tensors = load(members[name])
    del tensors["usage_E"]
    members[name] = save(tensors)


LAYER_DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flipped bit": flip,
    "missing": lambda path: rewrite(path, lambda members: members.pop("layer-1.safetensors")),
    "garbage": lambda path: rewrite(path, lambda members: members.update({"layer-1.safetensors": b"mine"})),
    "without usage": lambda path: rewrite(path, without_usage),
}


@pytest.mark.parametrize("damage", LAYER_DAMAGES)
def test_a_damaged_layer_ends_the_conversion_and_leaves_no_result(folder: Path, damage: str) -> None:
    LAYER_DAMAGES[damage](folder / "statistics")
    with pytest.raises(CalibrationError, match="is not a statistics file of hcsmoe") as caught:
        convert(folder / "model", replace(reusing(folder), checkpoint=False))
    assert "layer-1" in caught.value.message or "layer 1" in caught.value.message
    assert "`statistics`" in caught.value.hint
    assert not (folder / "result").exists()


def test_blocks_that_cannot_run_on_single_tokens_have_no_statistics_file(tmp_path: Path) -> None:
    save_tiny("gemma4_text", tmp_path / "model")
    np.save(tmp_path / "ids.npy", token_ids().numpy())
    asked = ConvertOptions(
        experts=3,
        output=tmp_path / "result",
        statistics=tmp_path / "statistics",
        calibration=CalibrationOptions(dataset=str(tmp_path / "ids.npy")),
    )
    error = refuse(tmp_path / "model", PlanError, asked)
    assert "`statistics` runs the MoE block of a layer again on single tokens" in error.message
    assert "are part of the decoder layer itself" in error.message
    assert error.hint == "leave `statistics` out"


# Failures

FAILURES = [RuntimeError("broken"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("name", ["default", "budget"])
def test_a_failed_conversion_leaves_no_unfinished_statistics(
    collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, name: str
) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise failure

    monkeypatch.setattr(hcsmoe_hub.layer.reducer, "merge_experts", fail)
    asked = wanted(
        collected,
        output=tmp_path / "result",
        statistics=tmp_path / "statistics",
        method=METHODS[name],
        checkpoint=False,
    )
    with pytest.raises(type(failure)) as caught:
        convert(collected / "model", asked)
    # What has nothing to do with the file is not blamed on it.
    assert caught.value is failure
    # Of two passes the first was finished, and its statistics are those of any other run.
    complete = {"statistics": (collected / "statistics").read_bytes()}
    assert contents(tmp_path) == (complete if name == "budget" else {})
