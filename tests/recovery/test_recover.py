"""``recover`` from end to end: nearer to the teacher, never worse, and nothing but what was trained changes."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from recovered import held_out_divergence, held_out_perplexity, run, write_text
from tiny_models import build, contents, differing, options, read_tensors

from hcsmoe_hub import convert
from hcsmoe_hub.errors import CalibrationError, HcsmoeError, OutputError, PlanError, SourceError, UnsupportedModelError
from hcsmoe_hub.report.read import read_report
from hcsmoe_hub.result.verify import check_structure

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_recovered_result_is_nearer_to_its_teacher(source):
    result, before = source.parent / "result", contents(source.parent)
    report = run(source)
    assert report.is_better
    assert report.output == source.parent / "recovered"
    record = report.record
    assert record["after"]["perplexity"] < record["before"]["perplexity"]
    for folder, score in ((result, record["before"]), (report.output, record["after"])):
        assert score["kl"] == pytest.approx(held_out_divergence(source, folder), rel=1e-3)
        assert score["perplexity"] == pytest.approx(held_out_perplexity(source, folder), rel=1e-4)
    after = contents(source.parent)
    assert {name: after[name] for name in before} == before, "neither the result nor its teacher has changed"
    assert all(name.startswith("recovered/") for name in after.keys() - before.keys())


def test_the_files_of_a_recovered_result_are_those_of_the_result(source):
    report = run(source)
    result = source.parent / "result"
    names = {name for name in contents(result) if name not in ("README.md", "hcsmoe.json")}
    found = contents(report.output)
    assert found.keys() == {*names, "README.md", "hcsmoe.json"}
    assert all(found[name] == contents(result)[name] for name in names if not name.endswith(".safetensors"))
    check_structure(report.output)


def test_the_report_of_the_result_says_what_was_done(source):
    report = run(source)
    text = (report.output / "hcsmoe.json").read_text()
    stored, before = read_report(text, label="report"), json.loads((source.parent / "result/hcsmoe.json").read_text())
    assert stored.recovery == report.record
    content = json.loads(text)
    del content["recovery"]
    assert content == before
    record = report.record
    assert record["steps"] == 12
    assert record["tokens"] == 12 * 8 * 24
    assert record["stopped"] == "steps"
    assert record["data"]["tokens"] == 36 * 24
    assert record["data"]["held_out_tokens"] == 12 * 24
    assert [point["step"] for point in record["history"]] == [0, 4, 8, 12]
    assert record["kept_step"] in (4, 8, 12)


def test_steps_that_make_it_worse_are_not_kept(source):
    report = run(source, learning_rate=5.0, max_steps=4, evaluate_every=2)
    assert not report.is_better
    assert report.record["kept_step"] == report.record["trained_tensors"] == 0
    assert report.record["after"] == report.record["before"]
    assert differing(read_tensors(report.output), read_tensors(source.parent / "result")) == []


def test_the_training_ends_early_when_nothing_improves(source):
    report = run(source, learning_rate=5.0, max_steps=12, evaluate_every=2, patience=2)
    assert report.record["stopped"] == "patience"
    assert report.record["steps"] == 4


def test_the_training_ends_when_its_time_is_over(source):
    report = run(source, max_steps=None, max_minutes=0.005, evaluate_every=1000)
    assert report.record["stopped"] == "time"
    assert report.record["history"][-1]["step"] == report.record["steps"] > 0


@pytest.mark.parametrize(
    ("train", "kinds"),
    [("router", ("gate.weight",)), ("experts", (".experts.",)), ("norms", ("norm.weight",))],
)
def test_only_what_is_to_be_trained_changes(source, train, kinds):
    report = run(source, train=train)
    changed = differing(read_tensors(report.output), read_tensors(source.parent / "result"))
    assert changed
    assert all(any(kind in name for kind in kinds) for name in changed)
    assert report.record["trained_tensors"] == len(changed)
    assert report.record["settings"]["train"] == [train]


def test_lora_is_added_to_the_matrices(source):
    report = run(source, train="lora", lora_rank=4, learning_rate=0.02)
    assert report.is_better
    found, before = read_tensors(report.output), read_tensors(source.parent / "result")
    changed = differing(found, before)
    assert found.keys() == before.keys()
    for kind in ("q_proj", "o_proj", ".w1.", ".w2.", ".w3.", "gate.weight"):
        assert any(kind in name for name in changed), kind
    assert not any("norm" in name or "embed" in name or "lm_head" in name for name in changed)
    assert report.record["after"]["kl"] == pytest.approx(held_out_divergence(source, report.output), rel=1e-3)
    assert report.record["settings"]["lora_rank"] == 4


def test_a_text_loss_can_be_added(source):
    with_text = run(source, text_weight=1.0, max_steps=4).record
    assert with_text["settings"]["text_weight"] == 1.0
    without = run(source, max_steps=4, overwrite=True).record
    assert with_text["history"] != without["history"]


def test_the_teacher_may_have_spoken_before(source):
    report = run(source, teacher_logits=source.parent / "logits", top_logits=64)
    assert report.is_better
    alone = run(source, output=source.parent / "alone")
    for name in ("before", "after"):
        assert report.record[name]["kl"] == pytest.approx(alone.record[name]["kl"], rel=0.02)
    assert report.record["settings"]["top_logits"] == 64


def test_gradients_can_be_added_up_and_computed_twice(source):
    whole = run(source, max_steps=3).record
    parts = run(source, output=source.parent / "parts", max_steps=3, batch_size=4, gradient_accumulation=2).record
    assert parts["history"][-1]["perplexity"] == pytest.approx(whole["history"][-1]["perplexity"], rel=0.05)
    twice = run(source, output=source.parent / "twice", max_steps=3, gradient_checkpointing=True).record
    assert twice["history"][-1]["perplexity"] == pytest.approx(whole["history"][-1]["perplexity"], rel=1e-4)


def test_the_random_numbers_of_the_caller_go_on_as_if_nothing_had_been_trained(source):
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed() -> None:
        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)

    seed()
    expected = draw()
    seed()
    run(source, max_steps=1)
    assert draw() == expected


def test_a_result_can_be_recovered_in_place(source):
    result = source.parent / "result"
    before = read_tensors(result)
    report = run(source, output=result, overwrite=True)
    assert report.output == result
    assert differing(read_tensors(result), before)
    assert not (result / "hcsmoe.incomplete").exists()
    assert read_report((result / "hcsmoe.json").read_text(), label="report").recovery == report.record


def test_a_result_of_bfloat16_is_scored_as_it_is_stored(tmp_path):
    source = build(tmp_path / "model", dtype=torch.bfloat16)
    write_text(source)
    convert(source, options(source, 4))
    report = run(source)
    tensors = read_tensors(report.output)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert report.record["after"]["perplexity"] == pytest.approx(held_out_perplexity(source, report.output), rel=1e-3)


# What is refused


def refusal(source: Path, kind: type[HcsmoeError], **others) -> HcsmoeError:
    """A refusal, which has a hint and leaves nothing behind."""
    before = contents(source.parent)
    with pytest.raises(kind) as caught:
        run(source, **others)
    after = contents(source.parent)
    assert caught.value.hint
    assert after == before
    return caught.value


def test_a_checkpoint_that_is_not_a_result_is_refused(source):
    (source.parent / "result/hcsmoe.json").unlink()
    assert "not a result of hcsmoe" in refusal(source, SourceError).message


def test_a_teacher_with_another_vocabulary_is_refused(source):
    build(source.parent / "other", vocab_size=80)
    error = refusal(source, PlanError, teacher=source.parent / "other")
    assert "80" in error.message
    assert error.option == "teacher"


def test_another_teacher_is_warned_of(source):
    other = build(source.parent / "other", num_local_experts=4)
    report = run(source, teacher=other, max_steps=1)
    assert any("was made from model" in message for message in report.warnings)


def test_a_folder_with_content_is_not_written_to(source):
    run(source, max_steps=1)
    assert "not empty" in refusal(source, OutputError).message
    assert "teacher itself" in refusal(source, OutputError, output=source, overwrite=True).message


def test_text_that_is_too_short_is_refused(source):
    assert "fewer than the 64 of one step" in refusal(source, CalibrationError, batch_size=64).message


def test_copies_of_merged_experts_are_refused(source):
    path = source.parent / "result/hcsmoe.json"
    report = json.loads(path.read_text())
    report["method"]["layout"] = "full"
    path.write_text(json.dumps(report))
    assert "copies" in refusal(source, UnsupportedModelError).message


def test_text_that_the_source_writes_is_refused(source):
    assert refusal(source, PlanError, data="self").option == "data"
