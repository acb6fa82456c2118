"""``refit='model'`` from end to end: nearer to the source on text it has not seen, and nothing half-trained is left."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from held_out_text import held_out_ids, hold_out, perplexity, predictions
from quantized_models import deepseek_fp8, gpt_oss_mxfp4
from short_training import build_loud, shorten_training
from tiny_models import contents, differing, options, read_tensors, refuse, token_ids
from torch import Tensor
from transformers import AutoModelForCausalLM

import hcsmoe_hub.pipeline.refit_model
import hcsmoe_hub.pipeline.whole_model
from hcsmoe_hub import ConvertOptions, MethodOptions, PushOptions, convert, plan, verify
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import CalibrationError, PlanError
from hcsmoe_hub.options import Dtype, Layout, Preset, Refit
from hcsmoe_hub.planning.estimate import estimate_needs
from hcsmoe_hub.publishing.delivery import Delivery
from hcsmoe_hub.report import ConversionReport
from hcsmoe_hub.report.read import read_report

pytestmark = pytest.mark.usefixtures("one_thread")

STATED = MethodOptions(preset=Preset.REAP, refit=Refit.MODEL)
# Sequences 7, 15, 23 and 31 judge.
TOKENS = token_ids(32, 24)
JUDGING = TOKENS[7::8]


@pytest.fixture(autouse=True)
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_training(monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Mixtral: 2 layers, 8 experts, 2 per token."""
    return build_loud(tmp_path / "model")


def wanted(source: Path, experts: int = 4, *, ids: Tensor | None = None, **others: Any) -> ConvertOptions:
    """Options of a conversion that ends with a training of the whole model."""
    ids = TOKENS if ids is None else ids
    return options(source, experts, ids=ids, overwrite=True, **({"method": STATED} | others))


def measured(source: Path, result: Path, ids: Tensor) -> float:
    """Mean KL divergence of a result from its source, as transformers itself loads them."""
    first, second = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits.log_softmax(-1)
        for folder in (source, result)
    )
    return float((first.exp() * (first - second)).sum(-1).mean())


def trained(report: ConversionReport) -> tuple[float, float]:
    """The divergence before and after."""
    assert report.refit_model is not None
    (domain,) = report.refit_model.domains
    return domain.kl_before, domain.kl_after


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_the_result_comes_nearer_to_its_source_on_text_it_was_not_trained_on(tmp_path: Path, model_type: str) -> None:
    source = build_loud(tmp_path / "model", model_type)
    asked = wanted(source)
    report = convert(source, asked)
    before, after = trained(report)
    assert report.refit_model is not None
    assert report.refit_model.is_kept
    assert after < before
    with torch.no_grad():
        assert measured(source, tmp_path / "result", JUDGING) == pytest.approx(after, rel=1e-3)
    assert (report.refit_model.fitted_tokens, report.refit_model.held_out_tokens) == (28 * 24, 4 * 24)
    stored = read_report((tmp_path / "result" / "hcsmoe.json").read_text(), label="hcsmoe.json")
    assert stored.refit_model == report.refit_model
    assert "refit" in report.timings_seconds


def test_the_figures_of_a_conversion_are_those_of_the_trained_model(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = held_out_ids(length=24)
    hold_out(monkeypatch, ids)
    report = convert(source, wanted(source))
    assert report.refit_model is not None
    assert report.refit_model.is_kept
    assert report.measured is not None
    figures = report.measured["overall"]
    for folder, name in ((source, "perplexity_before"), (tmp_path / "result", "perplexity_after")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert figures[name] == pytest.approx(perplexity(predictions(model, ids), ids), rel=1e-4)


def test_routers_experts_and_norms_are_trained_and_nothing_else(source: Path, tmp_path: Path) -> None:
    block = replace(wanted(source), method=replace(STATED, refit=Refit.BLOCK), output=tmp_path / "block")
    convert(source, block)
    convert(source, wanted(source))
    changed = set(differing(read_tensors(tmp_path / "result"), read_tensors(tmp_path / "block")))
    names = {name for name in read_tensors(tmp_path / "result") if "block_sparse_moe" in name or "norm" in name}
    assert changed == names


def test_a_trained_result_is_verified_against_its_source(source: Path, tmp_path: Path) -> None:
    convert(source, wanted(source))
    found = verify(tmp_path / "result", against=LocalSource(source))
    # Attention, embeddings and head are still compared.
    assert found.identical == 2 * 4 + 2


def test_verification_still_finds_what_was_neither_trained_nor_copied(source: Path, tmp_path: Path) -> None:
    report = convert(source, wanted(source))
    assert report.refit_model is not None
    assert report.refit_model.is_kept
    path = tmp_path / "result" / "hcsmoe.json"
    content = json.loads(path.read_text())
    content["refit_model"]["is_kept"] = False
    path.write_text(json.dumps(content))
    with pytest.raises(Exception, match="although the conversion only copies it"):
        verify(tmp_path / "result", against=LocalSource(source))


def test_equal_seeds_give_equal_bytes(source: Path, tmp_path: Path) -> None:
    convert(source, wanted(source))
    convert(source, replace(wanted(source), output=tmp_path / "again"))
    assert differing(read_tensors(tmp_path / "again"), read_tensors(tmp_path / "result")) == []


def test_a_harmful_training_is_dropped_and_leaves_the_bytes_of_the_layers(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hcsmoe_hub.pipeline.refit_model, "rates_for", lambda share: [1000.0, 100.0])
    report = convert(source, wanted(source))
    before, after = trained(report)
    assert report.refit_model is not None
    assert (report.refit_model.is_kept, report.refit_model.steps, after) == (False, 0, before)
    convert(source, replace(wanted(source), method=replace(STATED, refit=Refit.BLOCK), output=tmp_path / "block"))
    assert differing(read_tensors(tmp_path / "result"), read_tensors(tmp_path / "block")) == []
    verify(tmp_path / "result", against=LocalSource(source))


@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float32])
def test_weights_in_bfloat16_are_trained_and_judged_as_they_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: torch.dtype
) -> None:
    monkeypatch.setattr(hcsmoe_hub.pipeline.whole_model, "compute_dtype", lambda _device: computed)
    source = build_loud(tmp_path / "model", dtype=torch.bfloat16)
    report = convert(source, wanted(source))
    tensors = read_tensors(tmp_path / "result")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    before, after = trained(report)
    assert after < before
    with torch.no_grad():
        assert measured(source, tmp_path / "result", JUDGING) == pytest.approx(after, rel=0.05)


def test_a_model_that_keeps_all_its_experts_is_not_trained(source: Path, tmp_path: Path) -> None:
    assert convert(source, wanted(source, 8)).refit_model is None
    assert differing(read_tensors(tmp_path / "result"), read_tensors(source)) == []


class Sender:
    """Stands in for the connection to the Hub: keeps what it is given to upload."""

    def __init__(self) -> None:
        self.uploaded: dict[str, bytes] = {}

    def upload(self, *paths: Path) -> list[Path]:
        for path in paths:
            assert path.name not in self.uploaded, "sent once, when nothing changes it any more"
            self.uploaded[path.name] = path.read_bytes()
        return list(paths)

    def moved(self, folder: Path) -> None:
        """All files have been read."""

    def cancel(self) -> None:
        raise AssertionError("nothing has failed")


def test_shards_are_sent_after_the_training(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sender = Sender()
    publisher: Any = sender

    monkeypatch.setattr(
        "hcsmoe_hub.publishing.result.open_delivery", lambda *_, **__: Delivery(publisher, deletes=False)
    )
    monkeypatch.setattr("hcsmoe_hub.publishing.ending.push_result", lambda *_: None)
    report = convert(source, wanted(source, push=PushOptions(repo_id="me/model")))
    assert report.refit_model is not None
    assert report.refit_model.is_kept
    shards = {path.name: path.read_bytes() for path in (tmp_path / "result").glob("*.safetensors")}
    assert sender.uploaded == shards


# Failures


@pytest.mark.parametrize("place", ["Trainer", "overwrite_tensor"])
@pytest.mark.parametrize("failure", [RuntimeError("broken"), KeyboardInterrupt()], ids=lambda each: type(each).__name__)
def test_a_training_that_fails_leaves_no_result(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, failure: BaseException
) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        # Nobody takes for a checkpoint what there is at this moment.
        files = {path.name for path in (tmp_path / "result").iterdir()}
        assert not {"config.json", "model.safetensors.index.json", "hcsmoe.json"} & files
        assert files == {"hcsmoe.incomplete"}
        raise failure

    monkeypatch.setattr(hcsmoe_hub.pipeline.refit_model, place, fail)
    asked = wanted(source)
    before = contents(tmp_path)
    with pytest.raises(type(failure)) as caught:
        convert(source, asked)
    assert caught.value is failure
    # The next run goes on from the layers; nothing else is left.
    left = {name: content for name, content in contents(tmp_path).items() if "hcsmoe.incomplete/" not in name}
    assert left == before
    assert [path.name for path in (tmp_path / "result").iterdir()] == ["hcsmoe.incomplete"]


# Refusals

REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "low disk": ({"low_disk": True}, "`low_disk` deletes downloaded shards once they are converted"),
    "layout": (
        {"method": MethodOptions(layout=Layout.FULL, refit=Refit.MODEL)},
        "the full layout keeps to the papers, which refit nothing",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_training_cannot_go_with_is_refused(source: Path, name: str) -> None:
    others, message = REFUSALS[name]
    assert message in refuse(source, PlanError, wanted(source, **others)).message


def test_a_single_calibration_sequence_is_refused(source: Path) -> None:
    with pytest.raises(CalibrationError, match="fills only 1") as caught:
        convert(source, wanted(source, ids=TOKENS[:1]))
    assert "`sequence_length`" in caught.value.hint
    assert not (source.parent / "result").exists()


@pytest.mark.parametrize("quantised", [deepseek_fp8, gpt_oss_mxfp4])
def test_a_quantised_source_is_refused_unless_the_result_is_plain(
    tmp_path: Path, quantised: Callable[[Path], Path]
) -> None:
    source = quantised(tmp_path / "model")
    error = refuse(source, PlanError, wanted(source))
    assert "trains plain weights, and does not round them to the quantised format" in error.message
    report = convert(source, wanted(source, dtype=Dtype.BFLOAT16))
    assert report.refit_model is not None
    assert report.refit_model.is_kept


def test_a_training_that_does_not_fit_into_memory_is_refused_with_what_would(tmp_path: Path) -> None:
    # The logits of one step alone are more than a layer.
    source = build_loud(tmp_path / "model", vocab_size=30_000)
    asked = wanted(source)
    smaller = replace(asked, method=replace(STATED, refit=Refit.BLOCK))
    most, least = (estimate_needs(plan(source, each)).memory_bytes for each in (asked, smaller))
    assert most > least
    error = refuse(source, PlanError, replace(asked, max_memory=(most + least) // 2))
    assert "the conversion needs about" in error.message
    assert "`refit='block'`" in error.hint
