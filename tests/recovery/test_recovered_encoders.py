"""Recoveries of results with an encoder and a decoder: towards the teacher's predictions of targets alone."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration_text import text, write_rows
from encoder_decoders import BUILDERS, SOURCE, TARGET, VOCABULARY
from recovered import interrupt, run, wanted
from sided_models import build_switch
from tiny_models import build, differing, read_config, read_tensors
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, GenerationConfig

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, convert
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import PlanError, UnsupportedModelError
from hcsmoe_hub.events import ignore
from hcsmoe_hub.model.wrong_experts import run_chosen_experts
from hcsmoe_hub.options import Layout, Preset
from hcsmoe_hub.pipeline.whole_model import logits_of
from hcsmoe_hub.recovery import teacher_logits
from hcsmoe_hub.recovery.models import load_model
from hcsmoe_hub.recovery.trained import trained_weights
from hcsmoe_hub.result.verify import check_structure

pytestmark = pytest.mark.usefixtures("one_thread")

SEQUENCES, HELD_OUT = 96, 24
WITH_CODE = ("mapped", "factored")
every_kind = pytest.mark.parametrize("kind", BUILDERS)

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each kind, with pairs whose targets it would write itself next to it."""
    folder = tmp_path_factory.mktemp("encoders")
    for kind, builder in BUILDERS.items():
        model = loud(builder(decoder_start_token_id=0))
        model.save_pretrained(folder / kind / "model")
        np.save(folder / kind / "text.npy", written_pairs(model).numpy())
    return {kind: folder / kind / "model" for kind in BUILDERS}


@torch.no_grad()
def loud(model: Any) -> Any:
    """Makes the experts of a model matter for its logits."""
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.mul_(3)
        elif "decoder.final_layer_norm" in name:
            parameter.mul_(8)
    return model


def written_pairs(model: Any) -> Tensor:
    """Random sources, and what a model writes for them, ``[SEQUENCES, SOURCE + TARGET]``."""
    run_chosen_experts(model)
    torch.manual_seed(0)
    read = torch.randint(3, VOCABULARY, (SEQUENCES, SOURCE))
    settings = GenerationConfig(
        max_new_tokens=TARGET, do_sample=True, eos_token_id=None, pad_token_id=0, decoder_start_token_id=0
    )
    written = model.generate(read, attention_mask=torch.ones_like(read), generation_config=settings)
    return torch.cat([read, written[:, 1:]], dim=1)


@pytest.fixture(scope="module")
def results(sources: dict[str, Path]) -> Callable[[str, str], Path]:
    """Converts a model to half of its experts, once in each layout."""
    methods = {
        "reduced": MethodOptions(preset=Preset.REAP),
        "mapped": MethodOptions(preset=Preset.HC_SMOE, layout=Layout.MAPPED),
        "factored": MethodOptions(preset=Preset.HC_SMOE, compress="6,75%"),
    }

    def result(kind: str, layout: str) -> Path:
        source = sources[kind]
        output = source.parent / layout
        if not output.exists():
            text = CalibrationOptions(dataset=str(source.parent / "text.npy"), source_length=SOURCE)
            convert(
                source,
                ConvertOptions(experts=4, method=methods[layout], output=output, device="cpu", calibration=text),
            )
        return output

    return result


@pytest.fixture
def make(sources: dict[str, Path], results: Callable[[str, str], Path], tmp_path: Path) -> Make:
    """Copies a model to a folder that tests may change, its pairs and its ``result`` next to it."""

    def make(kind: str, layout: str = "reduced") -> Path:
        shutil.copytree(results(kind, layout), tmp_path / "own" / "result")
        shutil.copytree(sources[kind], tmp_path / "own" / "model")
        shutil.copy(sources[kind].parent / "text.npy", tmp_path / "own")
        return tmp_path / "own" / "model"

    return make


def recovered(source: Path, **others: Any) -> Any:
    return run(source, **({"source_length": SOURCE} | others))


def held_out_logits(source: Path, folder: Path) -> tuple[Tensor, Tensor]:
    """Logits of the held-out targets as transformers itself computes them, and the targets."""
    ids = torch.from_numpy(np.load(source.parent / "text.npy"))[-HELD_OUT:]
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    run_chosen_experts(model)
    with torch.no_grad():
        return model(input_ids=ids[:, :SOURCE], labels=ids[:, SOURCE:].contiguous()).logits, ids[:, SOURCE:]


def scores(source: Path, folder: Path) -> dict[str, Any]:
    """Perplexity of the held-out targets, and the divergence from the source on them."""
    (found, labels), (wanted, _) = held_out_logits(source, folder), held_out_logits(source, source)
    first, second = wanted.log_softmax(-1), found.log_softmax(-1)
    loss = torch.nn.functional.cross_entropy(found.flatten(0, 1), labels.flatten())
    divergence = (first.exp() * (first - second)).sum(-1).mean()
    return {"perplexity": pytest.approx(float(loss.exp()), rel=1e-3), "kl": pytest.approx(float(divergence), rel=1e-3)}


@every_kind
def test_a_recovered_result_predicts_targets_more_like_its_teacher(make, kind):
    source = make(kind)
    report = recovered(source)
    record = report.record
    assert report.is_better
    assert record["after"]["kl"] < record["before"]["kl"]
    assert record["before"] == scores(source, source.parent / "result")
    assert record["after"] == scores(source, report.output)
    assert record["data"]["source_length"] == SOURCE
    assert (record["data"]["sides"], record["data"]["is_split"]) == ("ids", True)
    assert read_config(report.output) == read_config(source.parent / "result")
    check_structure(report.output)


@every_kind
def test_gradients_reach_everything_that_is_trained_in_both_stacks(make, kind):
    source = make(kind)
    options = wanted(source, source_length=SOURCE)
    result, cpu = LocalSource(source.parent / "result"), torch.device("cpu")
    model, stored = load_model(result, cpu, ignore, compute=torch.float32)
    weights = trained_weights(model, stored, options)
    ids = torch.from_numpy(np.load(source.parent / "text.npy"))
    logits_of(model, cpu, SOURCE)(ids).log_softmax(-1)[..., 0].sum().backward()
    names = list(weights.parameters)
    for part in ("encoder", "decoder"):
        for kind_of_tensor in ("router", "experts", "norm"):
            assert any(part in name and kind_of_tensor in name for name in names)
    without = [name for name, parameter in weights.parameters.items() if not bool(parameter.grad.any())]
    assert without == []


@every_kind
def test_lora_is_added_to_the_matrices_of_both_stacks(make, kind):
    source = make(kind)
    report = recovered(source, train="lora", lora_rank=4, learning_rate=0.02)
    assert report.is_better
    assert report.record["after"] == scores(source, report.output)
    changed = differing(read_tensors(report.output), read_tensors(source.parent / "result"))
    attention = {
        "switch_transformers": ("encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.v"),
        "nllb-moe": ("encoder.layers.0.self_attn.q_proj", "decoder.layers.1.cross_attention.v_proj"),
    }
    for part in (*attention[kind], "router.classifier", ".experts.expert_"):
        assert any(part in name for name in changed), part
    assert not any("norm" in name or "bias" in name or "embed" in name for name in changed)


@every_kind
def test_steps_that_make_it_worse_are_not_kept(make, kind):
    source = make(kind)
    report = recovered(source, learning_rate=5.0, max_steps=4, evaluate_every=2)
    assert not report.is_better
    assert report.record["after"] == report.record["before"]
    assert differing(read_tensors(report.output), read_tensors(source.parent / "result")) == []


@every_kind
def test_logits_on_disk_are_those_of_the_teacher_in_memory(make, kind, monkeypatch):
    monkeypatch.setattr(teacher_logits, "FILE_BYTES", 20 * TARGET * (VOCABULARY * 4 + 8))
    monkeypatch.setattr("hcsmoe_hub.evaluation.scorers.free_bytes", lambda device: 0)
    source = make(kind)
    folder = source.parent / "logits"
    report = recovered(source, teacher_logits=folder, top_logits=VOCABULARY)
    alone = recovered(source, output=source.parent / "alone")
    assert report.is_better
    assert len(list(folder.glob("*.arrow"))) == 5
    for name in ("before", "after"):
        assert report.record[name]["kl"] == pytest.approx(alone.record[name]["kl"], rel=0.01)
    others = {"output": source.parent / "other", "teacher_logits": folder, "top_logits": VOCABULARY}
    with pytest.raises(PlanError, match=r"tokens of the source is 12 there and 10 here"):
        recovered(source, source_length=10, **others)


@every_kind
def test_a_recovery_that_goes_on_ends_in_the_same_bytes(make, kind):
    source = make(kind)
    undisturbed = recovered(source, output=source.parent / "undisturbed")
    interrupt(source, 6, source_length=SOURCE)
    report = recovered(source)
    assert differing(read_tensors(report.output), read_tensors(undisturbed.output)) == []
    assert report.record["history"] == undisturbed.record["history"]


@every_kind
@pytest.mark.parametrize("layout", WITH_CODE)
def test_results_with_a_modelling_file_are_recovered(make, kind, layout):
    source = make(kind, layout)
    report = recovered(source, train="experts+norms", learning_rate=0.05, max_steps=24)
    assert report.is_better
    found, before = read_tensors(report.output), read_tensors(source.parent / "result")
    assert found.keys() == before.keys()
    assert any(".experts." in name for name in differing(found, before))
    check_structure(report.output)


def test_lora_works_on_a_mapped_result(make):
    source = make("nllb-moe", "mapped")
    report = recovered(source, train="lora")
    assert report.is_better
    check_structure(report.output)


@every_kind
def test_lora_on_factors_is_refused(make, kind):
    with pytest.raises(UnsupportedModelError, match="factors already"):
        recovered(make(kind, "factored"), train="lora")


@every_kind
def test_layers_can_be_computed_twice_and_gradients_be_added_up(make, kind):
    source = make(kind)
    whole = recovered(source, max_steps=3).record["history"][-1]
    for number, others in enumerate(({"gradient_checkpointing": True}, {"batch_size": 4, "gradient_accumulation": 2})):
        other = recovered(source, output=source.parent / str(number), max_steps=3, **others).record["history"][-1]
        assert other["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-3)


@every_kind
def test_the_recipe_of_the_paper_trains_experts_and_norms_on_targets_and_teacher(make, kind):
    source = make(kind)
    recipe = {"kd_weight": 0.2, "text_weight": 1.0, "temperature": 2.0, "train": "experts+norms"}
    report = recovered(source, **recipe)
    assert report.is_better
    changed = differing(read_tensors(report.output), read_tensors(source.parent / "result"))
    assert not any("router" in name for name in changed)
    for part in ("encoder", "decoder"):
        for kind_of_tensor in ("experts", "norm"):
            assert any(part in name and kind_of_tensor in name for name in changed)


def test_a_teacher_without_an_encoder_is_refused(make):
    source = make("switch_transformers")
    other = build(source.parent / "other", vocab_size=VOCABULARY)
    with pytest.raises(PlanError, match=r"has an encoder and .* has none") as caught:
        recovered(source, teacher=other)
    assert caught.value.option == "teacher"


@pytest.mark.parametrize(
    ("row", "sides", "said"),
    [
        (lambda n: {"source": text(n, 6), "target": text(n + 100, 4)}, "pairs", "on pairs of source and target from"),
        (lambda n: {"text": text(n, 20)}, "spans", "with spans cut out, as in the pretraining of T5"),
    ],
)
def test_pairs_and_text_are_read_as_for_a_conversion(tmp_path, row, sides, said):
    source = build_switch(tmp_path / "model")
    data = write_rows(tmp_path / "text.jsonl", [row(3 * number) for number in range(80)])
    read = CalibrationOptions(dataset=str(data), sequence_length=30, samples=8)
    convert(source, ConvertOptions(experts=4, output=tmp_path / "result", device="cpu", calibration=read))
    report = run(source, data=data, sequence_length=30, batch_size=4, max_steps=4, learning_rate=0.005)
    record = report.record["data"]
    assert (record["sides"], record["is_split"]) == (sides, False)
    assert 0 < record["source_length"] < 30
    card = " ".join((report.output / "README.md").read_text().split())
    assert report.is_better
    assert said in card
    assert "perplexity of the targets" in card
