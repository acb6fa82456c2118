"""Conversions on pairs and on corrupted text: what is measured, recorded, and kept in a statistics file."""

import json
import math
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from calibration_text import refusal, text, write_rows
from sided_models import build_switch
from transformers import AutoModelForSeq2SeqLM

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, convert
from hcsmoe_hub import plan as plan_conversion
from hcsmoe_hub.calibration.denoising import corruption_to
from hcsmoe_hub.errors import CalibrationError, PlanError
from hcsmoe_hub.observation.statistics_file import StatisticsFile
from hcsmoe_hub.options import Preset
from hcsmoe_hub.report import ConversionReport

LENGTH = 60


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_switch(tmp_path_factory.mktemp("sided") / "switch")


@pytest.fixture(scope="module")
def pairs(source: Path) -> Path:
    rows = [
        {"source": text(one, 5 + one % 7), "target": text(200 + one, 3 + one % 4), "domain": "ab"[one % 2]}
        for one in range(190)
    ]
    return write_rows(source.parent / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def converted(source: Path, pairs: Path) -> tuple[Path, ConversionReport]:
    """A conversion of the pairs that has kept its statistics."""
    output = source.parent / "result"
    return output, convert(source, options(pairs, output, statistics=source.parent / "pairs.stats"))


def options(dataset: Path, output: Path, *, statistics: Path | None = None, **calibration: object) -> ConvertOptions:
    chosen = CalibrationOptions(dataset=str(dataset), **({"samples": 8, "sequence_length": LENGTH} | calibration))
    return ConvertOptions(
        experts=4,
        output=output,
        device="cpu",
        method=MethodOptions(preset=Preset.HC_SMOE),
        calibration=chosen,
        statistics=statistics,
    )


def test_the_report_says_how_sequences_are_split(converted: tuple[Path, ConversionReport]) -> None:
    _, report = converted
    calibration = report.calibration
    assert (calibration["sequence_length"], calibration["tokens"]) == (LENGTH, 8 * LENGTH)
    assert 30 < calibration["source_length"] < 45
    assert calibration["is_split"] is False
    assert {row["domain"] for row in calibration["domains"]} == {"a", "b"}


def test_held_out_targets_are_measured_as_transformers_predicts_them(
    source: Path, converted: tuple[Path, ConversionReport]
) -> None:
    output, report = converted
    held_out = StatisticsFile(source.parent / "pairs.stats").text()
    split = report.calibration["source_length"]
    assert held_out.source_length == split
    assert report.measured is not None
    assert report.measured["source_length"] == split
    assert report.measured["overall"]["tokens"] == held_out.measured_ids[:, split:].numel()
    for folder, name in ((source, "perplexity_before"), (output, "perplexity_after")):
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            sources, targets = held_out.measured_ids[:, :split], held_out.measured_ids[:, split:].clone()
            loss = model(input_ids=sources, labels=targets).loss
        assert report.measured["overall"][name] == pytest.approx(math.exp(loss), rel=1e-4)


def test_the_card_says_how_sequences_are_split(converted: tuple[Path, ConversionReport]) -> None:
    output, report = converted
    card = " ".join((output / "README.md").read_text().split())
    assert f"sequences of {LENGTH} tokens ({report.calibration['source_length']} for the encoder" in card
    assert "token of the target most likely" in card
    assert "--source-length" not in card


def test_statistics_serve_a_later_conversion(
    source: Path, pairs: Path, converted: tuple[Path, ConversionReport]
) -> None:
    output, report = converted
    again = source.parent / "again"
    repeated = convert(source, options(pairs, again, statistics=source.parent / "pairs.stats"))
    assert repeated.calibration == report.calibration
    assert repeated.measured == report.measured
    assert (again / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("converted")
def test_statistics_of_another_split_are_refused(source: Path, pairs: Path) -> None:
    asked = options(pairs, source.parent / "other", statistics=source.parent / "pairs.stats", source_length=20)
    assert "source length None, not 20" in refusal(lambda: plan_conversion(source, asked), PlanError).message


@pytest.mark.usefixtures("converted")
@pytest.mark.parametrize("value", [-1, LENGTH, 7])
def test_statistics_whose_split_is_damaged_are_refused(source: Path, tmp_path: Path, value: int) -> None:
    damaged = tmp_path / "damaged.stats"
    shutil.copy(source.parent / "pairs.stats", damaged)
    with zipfile.ZipFile(source.parent / "pairs.stats") as given, zipfile.ZipFile(damaged, "w") as taken:
        for name in given.namelist():
            content = given.read(name)
            if name == "statistics.json":
                document = json.loads(content)
                document["plan"]["source_length"] = value
                content = json.dumps(document).encode()
            taken.writestr(name, content)
    assert "source_length is" in refusal(lambda: StatisticsFile(damaged), CalibrationError).message


def test_a_split_that_is_asked_for_is_in_the_command_of_the_card(source: Path, pairs: Path, tmp_path: Path) -> None:
    report = convert(source, options(pairs, tmp_path / "result", source_length=35))
    assert (report.calibration["source_length"], report.calibration["is_split"]) == (35, True)
    assert "--source-length 35" in (tmp_path / "result" / "README.md").read_text()


def test_text_alone_is_corrupted(source: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "text.jsonl", [{"text": text(one, 40)} for one in range(60)])
    report = convert(source, options(rows, tmp_path / "result"))
    corruption = corruption_to(LENGTH)
    assert corruption is not None
    assert report.calibration["source_length"] == corruption.source_length
    assert report.measured is not None
