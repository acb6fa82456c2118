"""What a conversion cost, measured on held-out sequences that run through both models in the same pass."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import save_tiny
from held_out_text import DOMAINS, held_out_ids, hold_out, perplexity, predictions
from mtp_models import build_with_head, load_head
from quantized_models import BUILDERS, run
from tiny_models import build, differing, options, read_tensors, token_ids
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hcsmoe_hub import convert, plan
from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.checkpoint.tensors import StoredTensor
from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.evaluation.scorer import Request
from hcsmoe_hub.evaluation.scorers import LoadedScorer
from hcsmoe_hub.hub.open import open_source
from hcsmoe_hub.observation.statistics_file import StatisticsFile
from hcsmoe_hub.options import Budget, Layout, MethodOptions, Preset, Propagate, Refit
from hcsmoe_hub.pipeline.held_out import why_not_measured
from hcsmoe_hub.report import ConversionReport, Measured

IDS = held_out_ids()
# Logits that are scaled or capped, several copies of the hidden states, experts in the decoder layer itself, keys and
# values that layers share, choices beyond the experts, router weights on the inputs, and a plain model.
EVERYWHERE = [
    "granitemoe",
    "cohere2_moe",
    "deepseek_v4",
    "gemma4_text",
    "llama4_text",
    "dbrx",
    "nemotron_h",
    "mixtral",
]


def measured(report: ConversionReport) -> Measured:
    """The figures of a conversion that was measured."""
    assert report.measured is not None
    assert report.not_measured is None
    return report.measured


def check(found: Measured, source: PreTrainedModel, result: PreTrainedModel, ids: Tensor = IDS) -> None:
    """Compares figures with those of transformers' own forward."""
    before, after = (predictions(model.float().eval(), ids) for model in (source, result))
    overall, close = found["overall"], {"rel": 1e-4, "abs": 1e-6}
    assert overall["tokens"] == before.shape[0] * before.shape[1]
    assert overall["perplexity_before"] == pytest.approx(perplexity(before, ids), **close)
    assert overall["perplexity_after"] == pytest.approx(perplexity(after, ids), **close)
    assert overall["ratio"] == pytest.approx(perplexity(after, ids) / perplexity(before, ids), **close)
    logs = [logits.double().log_softmax(-1) for logits in (before, after)]
    kl = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    assert overall["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
    same = (before.argmax(-1) == after.argmax(-1)).float().mean()
    assert overall["top1_agreement"] == pytest.approx(float(same), abs=1e-6)
    for domain, row in found["domains"].items():
        rows = [number for number, name in enumerate(DOMAINS) if name == domain]
        assert row["tokens"] == len(rows) * before.shape[1]
        assert row["perplexity_after"] == pytest.approx(perplexity(after[rows], ids[rows]), **close)


def method(**choices: Any) -> MethodOptions:
    """The published method with some choices of its own."""
    return MethodOptions(preset=Preset.HC_SMOE, **choices)


@pytest.mark.parametrize("model_type", EVERYWHERE)
def test_figures_equal_those_of_the_models_own_forward(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(model_type, tmp_path / "model")
    hold_out(monkeypatch, IDS)
    report = convert(tmp_path / "model", options(tmp_path / "model", 4))
    result = type(source).from_pretrained(tmp_path / "result")
    found = measured(report)
    check(found, source, result)
    assert set(found["domains"]) == set(DOMAINS)
    assert found["overall"]["kl"] > 1e-4


@pytest.mark.parametrize("layout", [Layout.MAPPED, Layout.FULL])
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_results_that_keep_every_router_row_are_measured_alike(
    tmp_path: Path, model_type: str, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build(tmp_path / "model", model_type)
    hold_out(monkeypatch, IDS)
    found = measured(convert(source, options(source, 4, method=method(layout=layout))))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "result", trust_remote_code=True)
    check(found, AutoModelForCausalLM.from_pretrained(source), loaded)


@pytest.mark.parametrize("choices", [{"propagate": Propagate.MERGED, "refit": Refit.DOWN}, {"refit": Refit.DOWN}])
def test_fitted_results_are_measured_alike(
    tmp_path: Path, choices: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build(tmp_path / "model", "deepseek_v3")
    hold_out(monkeypatch, IDS)
    found = measured(convert(source, options(source, 4, ids=token_ids(32, 16), method=method(**choices))))
    check(found, *(AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("model", "result")))


def test_a_budget_that_depends_on_statistics_is_measured_in_the_pass_that_converts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build(tmp_path / "model", "qwen3_moe")
    hold_out(monkeypatch, IDS)
    wanted = options(source, 4, method=method(budget=Budget.FREQUENCY, layout=Layout.MAPPED))
    found = measured(convert(source, wanted))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "result", trust_remote_code=True)
    check(found, AutoModelForCausalLM.from_pretrained(source), loaded)


@pytest.mark.parametrize("sequences", [1, 16, 8])
def test_any_number_of_sequences_can_be_held_out(
    tmp_path: Path, sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, ids = build(tmp_path / "model"), held_out_ids(sequences)
    hold_out(monkeypatch, ids, ("",) * sequences)
    found = measured(convert(source, options(source, 4, ids=token_ids(8, 16), batch_tokens=48)))
    assert found["domains"] == {}
    check(found, *(AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("model", "result")), ids)


def test_as_many_experts_as_before_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build(tmp_path / "model")
    hold_out(monkeypatch, IDS)
    overall = measured(convert(source, options(source, 8)))["overall"]
    assert (overall["ratio"], overall["kl"], overall["top1_agreement"]) == (1.0, 0.0, 1.0)


# The conversion is the same with and without it


@pytest.mark.parametrize("model_type", ["mixtral", "gemma4_text", "nemotron_h"])
@pytest.mark.parametrize("propagate", Propagate)
def test_measuring_changes_no_bit_of_the_result(
    tmp_path: Path, model_type: str, propagate: Propagate, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(model_type, tmp_path / "model")
    hold_out(monkeypatch, IDS)
    reports = {}
    for measure in (True, False):
        wanted = options(
            tmp_path / "model",
            4,
            ids=token_ids(16, 16),
            output=tmp_path / str(measure),
            batch_tokens=64,
            measure=measure,
            method=method(propagate=propagate, refit=Refit.DOWN),
        )
        reports[measure] = convert(tmp_path / "model", wanted)
    assert differing(read_tensors(tmp_path / "True"), read_tensors(tmp_path / "False")) == []
    assert reports[True].layers == reports[False].layers
    assert reports[True].warnings == reports[False].warnings


def test_every_weight_byte_is_still_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build(tmp_path / "model", "deepseek_v3")
    hold_out(monkeypatch, IDS)
    read, names = TensorReader.read, list[str]()

    def counting(reader: TensorReader, tensor: StoredTensor, into: Tensor | None = None) -> Tensor:
        names.append(tensor.name)
        return read(reader, tensor, into)

    monkeypatch.setattr(TensorReader, "read", counting)
    measured(convert(source, options(source, 4)))
    assert sorted(names) == sorted(read_tensors(source))


# Nothing is measured


def test_measuring_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build(tmp_path / "model")
    hold_out(monkeypatch, IDS)
    report = convert(source, options(source, 4, measure=False))
    assert (report.measured, report.not_measured) == (None, "it was switched off")


def test_statistics_that_were_collected_without_held_out_text_leave_nothing_to_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build(tmp_path / "model")
    hold_out(monkeypatch, torch.empty(0, 16, dtype=torch.int64), ())
    with_file = options(source, 4, statistics=tmp_path / "statistics")
    convert(source, with_file)
    planned = plan(source, replace(with_file, output=tmp_path / "other"))
    # As if text had been read, but not to measure on.
    planned.calibration = replace(planned.calibration, is_token_ids=False, measures=False)
    text = StatisticsFile(tmp_path / "statistics").text()
    assert why_not_measured(planned, text) == "the statistics were collected without text to measure on"


def test_statistics_with_held_out_text_are_measured_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build(tmp_path / "model")
    hold_out(monkeypatch, IDS)
    measured(convert(source, options(source, 4, statistics=tmp_path / "statistics")))
    found = measured(convert(source, options(source, 3, statistics=tmp_path / "statistics", output=tmp_path / "other")))
    check(found, *(AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("model", "other")))


def test_a_file_of_token_ids_is_used_for_calibration_alone(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    report = convert(source, options(source, 4))
    assert (report.measured, report.not_measured) == (None, "all token ids were used for calibration")


def test_sequences_of_one_token_predict_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build(tmp_path / "model")
    hold_out(monkeypatch, held_out_ids(3, 1))
    report = convert(source, options(source, 4, ids=token_ids(8, 1)))
    assert report.not_measured == "sequences of one token predict nothing"


# Sources of other kinds


@pytest.mark.parametrize("propagate", Propagate)
@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_next"])
def test_a_prediction_head_is_converted_as_without_measuring(
    tmp_path: Path, model_type: str, propagate: Propagate, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build_with_head(tmp_path / "model", model_type)
    hold_out(monkeypatch, IDS)
    fitted = method(propagate=propagate, refit=Refit.DOWN)
    for measure in (True, False):
        wanted = options(
            source, 4, ids=token_ids(8, 16), output=tmp_path / str(measure), measure=measure, method=fitted
        )
        report = convert(source, wanted)
        if measure:
            check(measured(report), *(load_head(folder)[0] for folder in (source, tmp_path / "True")))
    assert differing(read_tensors(tmp_path / "True"), read_tensors(tmp_path / "False")) == []


def test_a_prediction_head_is_converted_after_a_budget_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build_with_head(tmp_path / "model", "deepseek_v3")
    hold_out(monkeypatch, IDS)
    reports, chosen = {}, method(budget=Budget.FREQUENCY, layout=Layout.FULL)
    for measure in (True, False):
        wanted = options(source, 4, output=tmp_path / str(measure), measure=measure, method=chosen)
        reports[measure] = convert(source, wanted)
    assert differing(read_tensors(tmp_path / "True"), read_tensors(tmp_path / "False")) == []
    assert measured(reports[True])["overall"]["tokens"] == IDS.shape[0] * (IDS.shape[1] - 1)


@pytest.mark.parametrize("kind", ["deepseek-fp8", "gpt-oss-mxfp4"])
def test_quantised_results_are_measured_as_they_are_stored(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = BUILDERS[kind](tmp_path / "model")
    ids = held_out_ids(64, 12)
    hold_out(monkeypatch, ids, ("",) * len(ids))
    found = measured(run(source, tmp_path / "result", 3, preset="hc-smoe"))
    figures = []
    for folder in (source, tmp_path / "result"):
        checkpoint = Checkpoint(open_source(str(folder)))
        scorer = LoadedScorer(checkpoint, torch.device("cpu"))
        logits = [found for _, found in scorer.logits([Request(row[:-1]) for row in ids.tolist()])]
        figures.append(perplexity(torch.stack(logits), ids))
    # The conversion computes in bfloat16, and evaluations in float32.
    overall = found["overall"]
    assert [overall["perplexity_before"], overall["perplexity_after"]] == pytest.approx(figures, rel=2e-2)
    assert overall["kl"] > 1e-4
