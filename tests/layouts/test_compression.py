"""Conversions whose experts become factors and a few whole rows: what is written, what it computes, what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import qwen3_fp8
from safetensors.torch import load_file
from tiny_models import build, options, read_config, read_tensors, refuse, token_ids
from torch import Tensor
from transformers import AutoModelForCausalLM

from hcsmoe_hub import MethodOptions, convert, verify
from hcsmoe_hub import plan as plan_conversion
from hcsmoe_hub.checkpoint.modeling_hcsmoe_factored import INCOMING, OUTGOING
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.cli.documents import model_document
from hcsmoe_hub.errors import PlanError, SourceError, VerificationError
from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.events import ignore
from hcsmoe_hub.model.source_model import read_model
from hcsmoe_hub.options import Dtype, Layout, Preset, Refit, RouterPolicy
from hcsmoe_hub.planning.sizes import active_parameters
from hcsmoe_hub.report import SINGULAR_VALUES_FILE
from hcsmoe_hub.report.read import read_report

QWEN = {"num_experts": 8, "shared_expert_intermediate_size": 24}
KINDS = [("mixtral", {}), ("qwen2_moe", QWEN)]
SETTING = "6,0.75"

LOAD = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **{"trust_remote_code": True}).eval()
with torch.no_grad():
    save_file({"logits": model(torch.arange(3, 15)[None]).logits}, sys.argv[2])
"""


def compressed(source: Path, setting: str = SETTING, *, experts: int = 4, **others: Any) -> Any:
    """Options of a conversion that compresses, otherwise as published, with the router of dominant experts."""
    method = MethodOptions(**{"preset": Preset.HC_SMOE, "compress": setting, **others.pop("choices", {})})
    return options(source, experts, method=method, **others)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 15)[None]).logits


def dense(tensors: dict[str, Tensor], prefix: str, place: str) -> Tensor:
    """``U V + S`` of all experts of a layer, ``[K, M, O, I]``."""
    left, right, sparse, rows = (tensors[f"{prefix}.{place}_{part}"] for part in ("u", "v", "s", "rows"))
    whole = left @ right
    for expert, part in ((expert, part) for expert in range(len(left)) for part in range(left.shape[1])):
        whole[expert, part].index_add_(0, rows[expert, part], sparse[expert, part])
    return whole


@pytest.mark.parametrize(("kind", "sizes"), KINDS, ids=["mixtral", "qwen2_moe"])
def test_a_result_computes_in_a_fresh_process_what_its_factors_stand_for(
    kind: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    source = build(tmp_path / "model", kind, **sizes)
    # The same conversion with whole matrices is the model to write the products into.
    convert(source, options(source, 4, output=tmp_path / "whole"))
    report = convert(source, compressed(source))
    whole, factors = AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), read_tensors(tmp_path / "result")
    for layer in report.layers:
        prefix = next(name.rpartition(".")[0] for name in factors if f"layers.{layer.layer}." in name and "_u" in name)
        experts = whole.model.layers[layer.layer].mlp.experts
        with torch.no_grad():
            experts.gate_up_proj.copy_(dense(factors, prefix, INCOMING).flatten(1, 2))
            experts.down_proj.copy_(dense(factors, prefix, OUTGOING)[:, 0])
    command = [sys.executable, "-c", LOAD, str(tmp_path / "result"), str(tmp_path / "logits")]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ":".join(sys.path)}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    found = load_file(tmp_path / "logits")["logits"]
    assert torch.allclose(found, logits_of(whole), atol=1e-5)
    assert verify(tmp_path / "result", against=LocalSource(source)).experts == 4


@pytest.mark.parametrize(("kind", "sizes"), KINDS, ids=["mixtral", "qwen2_moe"])
def test_parameters_bytes_and_operations_are_those_of_what_is_stored(
    kind: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    source = build(tmp_path / "model", kind, **sizes)
    report = convert(source, compressed(source))
    tensors, model = read_tensors(tmp_path / "result"), read_model(LocalSource(tmp_path / "result"))
    assert report.parameters["after"] == model.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert report.active_parameters["after"] == active_parameters(model)
    assert report.weights_bytes["after"] == sum(tensor.nbytes for tensor in tensors.values())
    experts = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
    # Two of four experts are active.
    idle = sum(tensor.numel() for tensor in experts.values()) // 2
    assert report.active_parameters["after"] == report.parameters["after"] - idle
    floats = sum(tensor.numel() for tensor in experts.values() if tensor.is_floating_point())
    assert report.compression is not None
    assert report.compression["expert_flops_per_token"]["after"] == floats
    width = read_config(source).get("moe_intermediate_size" if kind == "qwen2_moe" else "intermediate_size")
    assert report.compression["expert_flops_per_token"]["before"] == 2 * len(report.layers) * 2 * 3 * 32 * width
    assert (report.compression["rank"], report.compression["outgoing_rows"]) == (6, 8)


def test_ranks_are_reported_before_and_after_the_merge(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    report = convert(source, compressed(source))
    read = read_report((tmp_path / "result" / "hcsmoe.json").read_text(), label="hcsmoe.json")
    # Times of later stages are not in the file.
    assert (read.layers, read.compression) == (report.layers, report.compression)
    for layer in report.layers:
        assert layer.stable_rank is not None
        assert {name: len(ranks) for name, ranks in layer.stable_rank.before.items()} == dict.fromkeys(
            ("gate", "up", "down"), 8
        )
        for number, members in enumerate(layer.members()):
            ranks = layer.stable_rank.before["gate"][members[0]], layer.stable_rank.after["gate"][number]
            assert (ranks[0] == pytest.approx(ranks[1])) == (len(members) == 1)
    plain = convert(source, options(source, 4, output=tmp_path / "plain")).as_dict()
    assert "compression" not in plain
    assert "compress" not in plain["method"]
    assert not [layer for layer in plain["layers"] if "stable_rank" in layer]


def test_all_experts_can_be_compressed_without_a_merge(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    report = convert(source, compressed(source, "25%", experts=8))
    assert report.layers[0].experts == 8
    assert report.layers[0].output_error > 0.1
    assert not [name for name in read_tensors(tmp_path / "result") if name.endswith(("_s", "_rows"))]
    assert read_config(tmp_path / "result")["hcsmoe"]["rank"] == 8
    verify(tmp_path / "result")


def test_more_of_a_matrix_loses_less_of_the_output(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    errors = [
        convert(source, compressed(source, setting, experts=8, output=tmp_path / setting)).layers[0].output_error
        for setting in ("4", "4,90%", "4,60%")
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[2]


def test_the_default_refits_the_experts_that_become_factors(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    report = convert(source, options(source, 4, ids=token_ids(8, 64), method=MethodOptions(compress="8,0.5")))
    assert report.method["refit"] == Refit.BLOCK
    assert report.method["router"] == RouterPolicy.FIT
    assert all(layer.refit is not None for layer in report.layers)
    verify(tmp_path / "result")


def test_mc_smoe_is_its_preset_compressed(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    report = convert(source, compressed(source, choices={"preset": Preset.M_SMOE}))
    assert report.method["align"] == "weight"
    assert (report.method["budget"], report.method["layout"], report.method["compress"]) == (
        "uniform",
        Layout.FACTORED,
        "6,0.75",
    )


def test_a_figure_shows_the_singular_values(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source = build(tmp_path / "model")
    convert(source, compressed(source, figure=True))
    assert (tmp_path / "result" / SINGULAR_VALUES_FILE).read_bytes().startswith(b"\x89PNG")
    convert(source, options(source, 4, figure=True, overwrite=True))
    assert not (tmp_path / "result" / SINGULAR_VALUES_FILE).exists()


# Refusals


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("0", "1 or more"),
        ("0%", "from 1% to 100%"),
        ("120%", "from 1% to 100%"),
        ("32,1", "above 0 and below 1"),
        ("32,0", "above 0 and below 1"),
        ("0.25", "is not a compression"),
        ("32,0.9,1", "is not a compression"),
        ("", "is not a compression"),
    ],
)
def test_a_setting_that_is_none_is_refused(setting: str, said: str) -> None:
    with pytest.raises(PlanError, match=said) as caught:
        MethodOptions(compress=setting)
    assert caught.value.option == "compress"


@pytest.mark.parametrize(
    ("given", "written"), [(" 32 , 90% ", "32,0.9"), ("25 %", "25%"), ("32,0.75", "32,0.75"), ("25%,90%", "25%,0.9")]
)
def test_a_setting_is_written_in_one_way(given: str, written: str) -> None:
    assert MethodOptions(compress=given).compress == written


@pytest.mark.parametrize(
    ("choices", "said", "hint"),
    [
        ({"layout": Layout.MAPPED}, "the mapped layout holds whole matrices", "`layout`"),
        ({"layout": Layout.REDUCED}, "the reduced layout holds whole matrices", "`layout`"),
        ({"compress": None, "layout": Layout.FACTORED}, "not of which rank", "`compress='32,0.9'`"),
        ({"compress": "33"}, "rank 33, but the expert matrices of", "a rank of at most 19"),
        (
            {"compress": "20"},
            "makes 1,600 numbers of an expert matrix",
            "lower rank",
        ),
        ({"refit": Refit.MODEL}, "trains the weights of a result as a whole", "`refit='block'`"),
        ({"budget": "frequency"}, "gives each layer its own number", "`budget='uniform'`"),
        ({"layers": (1,)}, "leaves 1 MoE layers", "`layers`"),
    ],
    ids=str,
)
def test_what_factors_cannot_be_combined_with_is_refused(
    choices: dict[str, Any], said: str, hint: str, tmp_path: Path
) -> None:
    source = build(tmp_path / "model")
    error = refuse(source, PlanError, compressed(source, choices=choices))
    assert said in error.message
    assert hint in error.hint


def test_quantised_experts_are_compressed_in_bfloat16(tmp_path: Path) -> None:
    source = qwen3_fp8(tmp_path / "model")
    error = refuse(source, PlanError, compressed(source))
    assert "is quantised" in error.message
    assert error.hint == "add `dtype='bfloat16'`"
    planned = plan_conversion(source, compressed(source, dtype=Dtype.BFLOAT16))
    kinds = {tensor.dtype for tensor in planned.shards.tensors.values()}
    assert torch.bfloat16 in kinds
    assert torch.float8_e4m3fn not in kinds


def test_a_result_is_not_converted_again(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    convert(source, compressed(source))
    with pytest.raises(PlanError, match="have no matrices to merge") as caught:
        plan_conversion(tmp_path / "result", options(source, 2, output=tmp_path / "again"))
    assert caught.value.hint


def test_a_damaged_result_is_found(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    convert(source, compressed(source))
    config = read_config(tmp_path / "result")
    report = json.loads((tmp_path / "result" / "hcsmoe.json").read_text())
    report["method"]["layout"] = "reduced"
    (tmp_path / "result" / "hcsmoe.json").write_text(json.dumps(report))
    with pytest.raises(VerificationError, match=r"config\.json has sizes of factors"):
        verify(tmp_path / "result")
    config["hcsmoe"]["rank"] = 5
    (tmp_path / "result" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="has the shape"):
        verify(tmp_path / "result")


# Evaluation


def test_an_evaluation_runs_factors_with_the_code_of_this_package(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    convert(source, compressed(source))
    checkpoint = Checkpoint(LocalSource(tmp_path / "result"))
    skeleton = checkpoint.skeleton()
    with checkpoint.loading(skeleton, torch.device("cpu"), ignore) as loader:
        for layer in (None, *range(skeleton.depth)):
            loader.load(layer)
    skeleton.module.tie_weights()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "result", trust_remote_code=True)
    assert torch.allclose(logits_of(skeleton.module), logits_of(loaded), atol=1e-6)


def test_inspect_and_the_card_say_what_the_experts_are(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    convert(source, compressed(source))
    document = model_document(read_model(LocalSource(tmp_path / "result")))
    assert document["experts"]["factors"] == {"rank": 6, "incoming_rows": 12, "outgoing_rows": 8}
    assert document["projections"] == []
    card = " ".join((tmp_path / "result" / "README.md").read_text().split())
    assert "Every expert matrix is stored as two factors of rank 6 and 25.0 % of its rows, kept whole." in card
    assert "trust_remote_code=True" in card
    assert "`modeling_hcsmoe_factored.py` in this repository" in card
    assert "--compress 6,0.75" in card
