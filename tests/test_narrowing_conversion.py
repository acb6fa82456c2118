"""Conversions to narrower experts: what a result says of itself, and what becomes of a multi-token prediction head."""

import json
from pathlib import Path

import pytest
from mtp_models import build_with_head, head_keys
from tiny_models import build, change_tensors, options, read_tensors

from hcsmoe_hub import convert, plan
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.cli.documents import model_document
from hcsmoe_hub.errors import VerificationError
from hcsmoe_hub.model.source_model import read_model
from hcsmoe_hub.model_cards import write_card
from hcsmoe_hub.report import REPORT_FILE
from hcsmoe_hub.result.verify import check_structure


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral with all experts, of 16 neurons each instead of 48."""
    source = build(tmp_path_factory.mktemp("narrow") / "model")
    convert(source, options(source, None, expert_width=16))
    return source.parent / "result"


def test_a_narrowed_result_names_its_width_everywhere(result: Path) -> None:
    report = json.loads((result / REPORT_FILE).read_text())
    assert report["experts"] | {"width_before": 48, "width_after": 16} == report["experts"]
    assert model_document(read_model(LocalSource(result)))["experts"]["width"] == 16
    check_structure(result)
    card = write_card(result).path.read_text("utf-8")
    assert "| Neurons per expert | 48 | 16 |" in card
    assert "--expert-width 16" in card
    assert "--experts " not in card


def test_a_width_that_is_not_the_reported_one_is_found(result: Path) -> None:
    file = result / REPORT_FILE
    text = file.read_text()
    report = json.loads(text)
    report["experts"]["width_after"] = 24
    file.write_text(json.dumps(report))
    with pytest.raises(VerificationError) as caught:
        check_structure(result)
    file.write_text(text)
    assert "declares experts of 24 neurons, config.json experts of 16" in caught.value.message


def test_the_experts_of_a_head_are_narrowed_like_those_of_a_layer(tmp_path: Path) -> None:
    source = build_with_head(tmp_path / "model", "glm4_moe")
    report = convert(source, options(source, None, expert_width=12))
    assert report.dropped_tensors == {}
    assert head_keys(tmp_path / "result") == head_keys(source)
    before, after = read_tensors(source), read_tensors(tmp_path / "result")
    down = "model.layers.2.mlp.experts.3.down_proj.weight"
    assert (before[down].shape[1], after[down].shape[1]) == (24, 12)
    check_structure(tmp_path / "result")


def test_a_head_that_cannot_be_narrowed_is_not_copied_with_its_old_width(tmp_path: Path) -> None:
    source = build_with_head(tmp_path / "model", "deepseek_v3")
    change_tensors(source, lambda tensors: tensors.pop("model.layers.2.mlp.experts.7.up_proj.weight"))
    assert plan(source, options(source, 8)).account.dropped == {}
    assert plan(source, options(source, None, expert_width=12)).account.dropped.keys() == head_keys(source)
