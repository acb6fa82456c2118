"""A recovery whose models compute in bfloat16, which every processor can, if not fast."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recovered import held_out_divergence, interrupt, run
from sided_models import build_switch
from tiny_models import differing, read_tensors

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, Preset, convert
from hcsmoe_hub.recover import RecoveryReport
from hcsmoe_hub.recovery.options import Precision

pytestmark = pytest.mark.usefixtures("one_thread")


def recovered(source: Path, **others: Any) -> RecoveryReport:
    return run(source, **({"dtype": Precision.BFLOAT16} | others))


def test_a_result_comes_nearer_to_its_teacher_and_is_stored_as_it_was(source: Path) -> None:
    report = recovered(source)
    assert report.is_better
    assert report.record["settings"]["dtype"] == "bfloat16"
    for folder, when in ((source.parent / "result", "before"), (report.output, "after")):
        assert report.record[when]["kl"] == pytest.approx(held_out_divergence(source, folder), rel=0.03)
    dtypes = [{tensor.dtype for tensor in read_tensors(folder).values()} for folder in (source, report.output)]
    assert dtypes == [{torch.float32}, {torch.float32}]


def test_the_teacher_may_have_spoken_before(source: Path) -> None:
    alone = recovered(source, output=source.parent / "alone").record
    stored = recovered(source, teacher_logits=source.parent / "logits", top_logits=64).record
    assert stored["kept_step"] > 0
    assert stored["after"]["kl"] == pytest.approx(alone["after"]["kl"], rel=0.1)


def test_lora_is_trained_and_merged(source: Path) -> None:
    report = recovered(source, train="lora", lora_rank=4)
    assert report.is_better
    assert differing(read_tensors(report.output), read_tensors(source.parent / "result"))


def test_an_interrupted_recovery_ends_in_the_same_bytes(source: Path) -> None:
    whole = recovered(source, output=source.parent / "undisturbed")
    interrupt(source, 6, dtype=Precision.BFLOAT16)
    again = recovered(source)
    assert differing(read_tensors(again.output), read_tensors(whole.output)) == []
    assert again.record["history"] == whole.record["history"]


def test_a_model_with_an_encoder_comes_nearer_to_its_teacher(tmp_path: Path) -> None:
    source = build_switch(tmp_path / "model")
    ids = np.random.default_rng(0).integers(3, 64, (48, 24))
    np.save(tmp_path / "text.npy", ids)
    text = CalibrationOptions(dataset=str(tmp_path / "text.npy"), source_length=16)
    method = MethodOptions(preset=Preset.HC_SMOE)
    convert(
        source, ConvertOptions(experts=4, method=method, calibration=text, device="cpu", output=tmp_path / "result")
    )
    assert recovered(source, source_length=16, teacher_logits=tmp_path / "logits").is_better
