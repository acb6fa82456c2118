"""Every refusal comes with the plan: the right error, the real values, what to do, and nothing written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import save_tiny
from tiny_models import (
    INDEX,
    build,
    change_config,
    change_tensors,
    contents,
    options,
    read_config,
    read_tensors,
    refuse,
    token_ids,
    write_tensors,
)
from torch import Tensor

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions
from hcsmoe_hub import plan as plan_conversion
from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.errors import OutputError, PlanError, UnsupportedModelError
from hcsmoe_hub.model.width import neurons_of
from hcsmoe_hub.options import Distance, Dtype, Linkage, Preset, Refit
from hcsmoe_hub.planning.estimate import estimate_needs, refit_flops
from hcsmoe_hub.planning.layer_sizes import expert_parameters


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Mixtral: 2 layers, 8 experts, 2 per token."""
    return build(tmp_path / "model")


def write_config(folder: Path, **config: Any) -> Path:
    """A checkpoint that consists of a config."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# Nothing is read and nothing is written


def test_a_plan_reads_no_weight_and_writes_no_file(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(reader: TensorReader, tensor: object) -> Tensor:
        raise AssertionError("a plan reads headers only")

    monkeypatch.setattr(TensorReader, "read", read)
    wanted = options(source, 4)
    before = contents(source.parent)
    plan = plan_conversion(source, wanted)
    assert (plan.settings.experts, plan.output) == (4, source.parent / "result")
    assert contents(source.parent) == before


def test_the_default_output_is_named_after_the_source_and_the_count(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    wanted = options(source, 4)
    plan = plan_conversion(source, ConvertOptions(experts=4, calibration=wanted.calibration))
    assert plan.output == Path("model-hcsmoe-4e")


# Models


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    dense = build(tmp_path / "model", "llama")
    error = refuse(dense, UnsupportedModelError, options(dense, 4))
    assert f"{dense} has model_type 'llama', which is a dense model" in error.message
    assert "hcsmoe architectures" in error.hint


def test_a_model_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model", model_type="made_up_moe", num_experts=8)
    message = refuse(folder, UnsupportedModelError, options(folder, 4)).message
    assert "model_type 'made_up_moe' is not part of transformers" in message
    assert "hcsmoe runs no code from a repository" in message


def test_a_config_that_does_not_name_its_model_is_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model", model_type=None, num_experts=8)
    error = refuse(folder, UnsupportedModelError, options(folder, 4))
    assert "config.json has no model_type" in error.message
    assert "in the format of transformers" in error.hint


def test_a_model_that_generates_no_text_is_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model", model_type="vit", num_experts=8)
    message = refuse(folder, UnsupportedModelError, options(folder, 4)).message
    assert "model_type 'vit' is not a language model that generates text from text" in message


def test_an_encoder_decoder_model_without_experts_is_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model", model_type="t5")
    message = refuse(folder, UnsupportedModelError, options(folder, 4)).message
    assert "has model_type 't5', which is a dense model: its config names no experts to merge" in message


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("doge", "retrieved by product keys"),
        ("jetmoe", "attention experts cannot be merged by their outputs"),
        ("longcat_flash", "zero-computation experts"),
    ],
)
def test_an_architecture_that_cannot_be_converted_is_refused_with_its_reason(
    tmp_path: Path, model_type: str, reason: str
) -> None:
    folder = write_config(tmp_path / "model", model_type=model_type)
    message = refuse(folder, UnsupportedModelError, options(folder, 4)).message
    assert f"model_type {model_type!r}, which is refused: " in message
    assert reason in message


@pytest.mark.parametrize(("method", "name"), [("gptq", "GPTQ"), ("awq", "AWQ"), ("bitsandbytes", "bitsandbytes")])
def test_a_quantisation_that_is_not_decoded_is_refused_by_name(source: Path, method: str, name: str) -> None:
    change_config(source, quantization_config={"quant_method": method, "bits": 4})
    codes = torch.zeros(4, 4, dtype=torch.int32)
    change_tensors(source, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.qweight": codes}))
    error = refuse(source, UnsupportedModelError, options(source, 4))
    assert f"quantised with {name} (" in error.message
    assert "unquantised" in error.hint


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors", "fp8", "evil-4bit"])
def test_a_quantisation_config_over_plain_weights_is_left_behind_with_a_warning(source: Path, method: str) -> None:
    change_config(source, quantization_config={"quant_method": method, "bits": 4})
    planned = plan_conversion(source, options(source, 4))
    assert "quantization_config" not in planned.config
    assert planned.warnings == [
        f"config.json says that the weights are quantised with '{method}', but they are plain numbers; the result is "
        "written without that entry."
    ]


def test_eight_bit_weights_without_scales_are_refused(source: Path) -> None:
    narrow = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in read_tensors(source).items()}
    write_tensors(source, narrow)
    message = refuse(source, UnsupportedModelError, options(source, 4)).message
    assert "holds torch.float8_e4m3fn codes" in message
    assert "it has no quantization_config, and no scales of a known kind are stored next to it" in message


def test_plain_weights_of_another_dtype_are_not_cast(source: Path) -> None:
    error = refuse(source, PlanError, replace(options(source, 4), dtype=Dtype.BFLOAT16))
    assert "`dtype='bfloat16'` decodes quantised weights, but those of" in error.message
    assert "are plain float32" in error.message


def test_experts_of_mixed_precision_are_refused(source: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    change_tensors(source, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    message = refuse(source, UnsupportedModelError, options(source, 4)).message
    assert f"expert tensor {name!r} is stored as torch.bfloat16, most weights as torch.float32" in message


# Counts


@pytest.mark.parametrize(("experts", "why"), [(9, "it has only 8"), (1, "a router needs at least 2")])
def test_a_count_outside_of_what_can_be_kept_is_refused(source: Path, experts: int, why: str) -> None:
    error = refuse(source, PlanError, options(source, experts))
    assert f"cannot keep {experts} experts per layer of {source}: {why}" in error.message
    assert error.hint == "use `experts` with a number from 2 to 8"


def test_fewer_experts_than_each_token_visits_are_refused(tmp_path: Path) -> None:
    model = build(tmp_path / "model", num_experts_per_tok=3)
    error = refuse(model, PlanError, options(model, 2))
    assert f"cannot keep 2 of 8 experts: the router of {model} selects 3 experts per token" in error.message
    assert error.hint == "use `experts=3` or more, or lower the selection with `experts_per_token=2`"


def test_fewer_experts_than_each_token_visits_are_accepted_with_fewer_visits(tmp_path: Path) -> None:
    model = build(tmp_path / "model", num_experts_per_tok=3)
    plan = plan_conversion(model, options(model, 2, experts_per_token=1))
    assert (plan.settings.experts, plan.settings.experts_per_token) == (2, 1)


def test_more_visits_than_experts_are_refused(source: Path) -> None:
    error = refuse(source, PlanError, options(source, 4, experts_per_token=5))
    assert "would select 5 experts per token" in error.message
    assert "`experts_per_token=4`" in error.hint


@pytest.mark.parametrize("groups_per_token", [1, 2])
def test_a_count_that_leaves_groups_of_one_expert_is_refused(tmp_path: Path, groups_per_token: int) -> None:
    # A group is scored by its best two experts, so one is too few even where every group may be chosen from.
    model = build(tmp_path / "model", "deepseek_v3", topk_group=groups_per_token)
    error = refuse(model, PlanError, options(model, 2))
    assert "2 experts in 2 groups are 1 per group" in error.message
    assert error.hint == "use `experts=4` or more"
    assert plan_conversion(model, options(model, 4)).settings.groups == 2


def test_a_count_that_leaves_too_few_experts_in_the_chosen_groups_is_refused(tmp_path: Path) -> None:
    model = build(tmp_path / "model", "deepseek_v3", num_experts_per_tok=3)
    error = refuse(model, PlanError, options(model, 4))
    assert "selects 3 experts from 1 groups" in error.message
    assert error.hint == "use `experts=6` or more"
    assert plan_conversion(model, options(model, 6)).settings.groups == 2


def test_ward_linkage_with_another_distance_than_euclidean_is_refused(source: Path) -> None:
    method = MethodOptions(linkage=Linkage.WARD, distance=Distance.COSINE)
    error = refuse(source, PlanError, options(source, 4, method=method))
    assert "ward linkage measures squared errors, which cosine distances of expert-output do not have" in error.message
    assert "`distance='euclidean'`" in error.hint


# The place of the result


def test_a_folder_that_is_not_empty_is_refused(source: Path) -> None:
    folder = source.parent / "used"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    error = refuse(source, OutputError, options(source, 4, output=folder))
    assert error.message == f"{folder} is not empty."
    assert "`overwrite=True`" in error.hint


def test_a_folder_without_a_checkpoint_is_never_overwritten(source: Path) -> None:
    folder = source.parent / "photos"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    error = refuse(source, OutputError, options(source, 4, output=folder, overwrite=True))
    assert f"{folder} holds files but no checkpoint" in error.message


def test_an_empty_folder_is_accepted(source: Path) -> None:
    (source.parent / "result").mkdir()
    assert plan_conversion(source, options(source, 4)).output == source.parent / "result"


@pytest.mark.parametrize("below", ["", "result", "deeper/result"])
def test_a_file_in_the_place_of_a_folder_is_refused(source: Path, below: str) -> None:
    file = source.parent / "file"
    file.write_text("mine")
    message = refuse(source, OutputError, options(source, 4, output=file / below)).message
    assert f"{file} is a file" in message


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("spelling", ["model", "model/../model", "link"])
def test_the_source_itself_is_refused(source: Path, spelling: str, overwrite: bool) -> None:
    (source.parent / "link").symlink_to(source)
    output = source.parent / spelling
    error = refuse(source, OutputError, options(source, 4, output=output, overwrite=overwrite))
    assert error.message == f"{output} is the source itself."


def test_a_limit_on_memory_below_what_is_needed_is_refused(source: Path) -> None:
    needed = estimate_needs(plan_conversion(source, options(source, 4))).memory_bytes
    plan_conversion(source, options(source, 4, max_memory=needed))
    error = refuse(source, PlanError, options(source, 4, max_memory=needed - 1))
    assert "more than the" in error.message
    assert "of `max_memory`" in error.message
    # So small a model needs hardly more than the libraries do, whatever the options.
    assert error.hint == "raise `max_memory`"


def test_experts_without_a_gate_have_as_many_neurons_as_they_are_wide(tmp_path: Path) -> None:
    refits = dict[int, float]()
    for model_type, matrices in (("nemotron_h", 2), ("olmoe", 3)):
        model = save_tiny(model_type, tmp_path / model_type)
        wanted = options(tmp_path / model_type, 4, method=MethodOptions(refit=Refit.DOWN))
        plan = plan_conversion(tmp_path / model_type, wanted)
        config = model.config
        neurons = config.moe_intermediate_size if matrices == 2 else config.intermediate_size
        assert neurons_of(plan.model) == neurons
        assert expert_parameters(plan) == matrices * config.hidden_size * neurons
        refits[matrices] = refit_flops(plan)
    assert all(refits.values())


# Device and calibration


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:3"])
def test_a_device_that_the_machine_does_not_have_is_refused(
    source: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = refuse(source, PlanError, options(source, 4, device=device))
    assert error.message == f"`device='{device}'` was requested, but torch finds no CUDA device."
    assert error.hint == "use `device='auto'` or `device='cpu'`"


def test_a_device_beyond_the_last_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = refuse(source, PlanError, options(source, 4, device="cuda:2")).message
    assert message == "`device='cuda:2'` was requested, but torch finds 2 CUDA devices."


def test_without_an_accelerator_auto_is_the_cpu(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = plan_conversion(source, options(source, 4, device="auto"))
    assert estimate_needs(plan).device_bytes == 0


def test_token_ids_longer_than_the_model_takes_are_refused(source: Path) -> None:
    error = refuse(source, PlanError, options(source, 4, ids=token_ids(2, 65)))
    assert f"sequences of 65 tokens are longer than the 64 positions of {source}" in error.message
    assert "64 ids or fewer" in error.hint
    plan_conversion(source, options(source, 4, ids=token_ids(2, 64)))


def test_text_sequences_longer_than_the_model_takes_are_refused(source: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    wanted = ConvertOptions(
        experts=4, output=source.parent / "result", calibration=CalibrationOptions(sequence_length=65)
    )
    error = refuse(source, PlanError, wanted)
    assert "sequences of 65 tokens" in error.message
    assert error.hint == "use `sequence_length=64` or less"


@pytest.mark.parametrize(
    ("method", "sequences"),
    [(MethodOptions(preset=Preset.HC_SMOE), 1024), (MethodOptions(), 2048)],
    ids=["merge", "fit"],
)
def test_text_sequences_are_as_long_as_the_model_takes_and_as_many_as_hold_the_usual_tokens(
    source: Path, method: MethodOptions | None, sequences: int
) -> None:
    (source / "tokenizer.json").write_text("{}")
    plan = plan_conversion(source, ConvertOptions(experts=4, output=source.parent / "result", method=method))
    assert (plan.calibration.sequences, plan.calibration.sequence_length) == (sequences, 64)


def test_calibration_text_without_a_tokenizer_is_refused(source: Path) -> None:
    error = refuse(source, PlanError, ConvertOptions(experts=4, output=source.parent / "result"))
    assert f"{source} has no tokenizer" in error.message
    assert ".npy" in error.hint


# Warnings


def warnings(source: Path, experts: int, **others: Any) -> list[str]:
    """What a plan warns of."""
    return plan_conversion(source, options(source, experts, **others)).warnings


def test_an_ordinary_plan_warns_of_nothing(source: Path) -> None:
    assert warnings(source, 4) == []


def test_keeping_every_expert_is_pointed_out(source: Path) -> None:
    assert warnings(source, 8) == ["`experts=8` keeps all that the model has; the result will not be smaller."]


def test_layers_that_become_dense_are_pointed_out(source: Path) -> None:
    assert warnings(source, 2) == ["all 2 experts will be active for every token: the layers become dense."]
    assert warnings(source, 2, experts_per_token=1) == []


def test_a_number_of_experts_that_a_server_cannot_run_is_pointed_out_with_the_nearest(tmp_path: Path) -> None:
    save_tiny("deepseek_v4", tmp_path / "model")
    (warning,) = warnings(tmp_path / "model", 5)
    assert "does not start a deepseek_v4 model of 5 experts on CUDA" in warning
    assert "The nearest that runs is 4." in warning
    assert warnings(tmp_path / "model", 4) == []


def test_routing_without_groups_is_pointed_out(tmp_path: Path) -> None:
    model = build(tmp_path / "model", "deepseek_v3")
    expected = "5 experts cannot be split into 2 groups: group-limited routing is switched off (one group)."
    assert warnings(model, 5) == [expected]
    assert warnings(model, 6) == []
    config = plan_conversion(model, options(model, 5)).config
    assert (config["n_group"], config["topk_group"], read_config(model)["n_group"]) == (1, 1, 2)


def test_a_source_with_an_index_of_a_single_shard_is_planned_like_any_other(source: Path) -> None:
    write_tensors(source, read_tensors(source), shards=1)
    assert (source / INDEX).exists()
    assert plan_conversion(source, options(source, 4)).settings.experts == 4
