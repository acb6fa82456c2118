"""Results of quantised sources: in the source's format, with its bytes wherever nothing changed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import BUILDERS, EXPERTS, run, same_bytes, stored, wanted, weight_bytes
from transformers import AutoModelForCausalLM

from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.convert import plan
from hcsmoe_hub.model.source_model import read_model
from hcsmoe_hub.planning.sizes import projections
from hcsmoe_hub.planning.sizes import weight_bytes as planned_bytes
from hcsmoe_hub.report import ConversionReport
from hcsmoe_hub.result.verify import check_structure, verify

KEPT = 3


@pytest.fixture(scope="module", params=BUILDERS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return BUILDERS[request.param](tmp_path_factory.mktemp("source") / request.param)


def kept_pairs(source: Path, result: Path, report: ConversionReport) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The tensors of every kept expert, in the source and in the result."""
    before, after = stored(source), stored(result)
    pairs = []
    for layer in report.layers:
        inside = [name for name in after if f"layers.{layer.layer}." in name and ".experts." in name]
        assert inside
        for name in inside:
            number = name.split(".experts.")[1].split(".")[0]
            if number.isdecimal():
                old = name.replace(f".experts.{number}.", f".experts.{layer.dominant[int(number)]}.")
                pairs.append((before[old], after[name]))
            else:
                pairs += [(before[name][old], after[name][new]) for new, old in enumerate(layer.dominant)]
    return pairs


def test_keeping_every_expert_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "result", EXPERTS, preset="hc-smoe")
    before, after = stored(source), stored(tmp_path / "result")
    assert before.keys() == after.keys()
    assert [name for name in before if not same_bytes(before[name], after[name])] == []
    assert json.loads((source / "config.json").read_text()) == json.loads(
        (tmp_path / "result" / "config.json").read_text()
    )


@pytest.fixture(scope="module")
def pruned(source: Path) -> tuple[Path, ConversionReport]:
    """Half of the experts, by pruning."""
    folder = source.with_name("pruned")
    return folder, run(source, folder, KEPT, preset="reap")


@pytest.fixture(scope="module")
def merged(source: Path) -> tuple[Path, ConversionReport]:
    """Half of the experts, by merging."""
    folder = source.with_name("merged")
    return folder, run(source, folder, KEPT, preset="hc-smoe")


def test_half_of_the_experts_weighs_what_was_not_removed(source: Path, pruned: tuple[Path, ConversionReport]) -> None:
    folder, report = pruned
    before, after = stored(source), stored(folder)
    sized = [name for name in before if ".experts." in name or "mlp.gate." in name or "router" in name]
    removed = sum(before[name].nbytes for name in sized if "shared" not in name) * (EXPERTS - KEPT) / EXPERTS
    found = weight_bytes(folder)
    assert found == pytest.approx(weight_bytes(source) - removed, rel=0.01)
    assert report.weights_bytes == {"before": weight_bytes(source), "after": found}
    assert {tensor.dtype for tensor in after.values()} == {tensor.dtype for tensor in before.values()}


def test_kept_experts_keep_their_bytes(source: Path, pruned: tuple[Path, ConversionReport]) -> None:
    pairs = kept_pairs(source, *pruned)
    assert all(same_bytes(old, new) for old, new in pairs)


def test_what_is_not_an_expert_or_a_router_is_copied(source: Path, merged: tuple[Path, ConversionReport]) -> None:
    before, after = stored(source), stored(merged[0])
    others = [name for name in before if ".experts." not in name and "gate." not in name and "router" not in name]
    assert others
    assert all(same_bytes(before[name], after[name]) for name in others)


def test_plan_inspection_and_verification_agree_on_the_size(
    source: Path, merged: tuple[Path, ConversionReport], tmp_path: Path
) -> None:
    planned = plan(source, wanted(tmp_path / "other", KEPT, merged[0].with_suffix(".npy"), preset="hc-smoe"))
    found = weight_bytes(merged[0])
    assert planned_bytes(planned)["after"] == found
    half = next(each for each in projections(read_model(LocalSource(source))) if each.experts == KEPT)
    # But for the rows of the routers.
    assert half.weights_bytes == pytest.approx(found, rel=0.04)
    assert verify(merged[0], against=LocalSource(source)).weights_bytes == found


def test_measured_errors_see_the_rounded_weights(
    source: Path, merged: tuple[Path, ConversionReport], tmp_path: Path
) -> None:
    plain = run(source, tmp_path / "plain", KEPT, preset="hc-smoe", dtype="bfloat16")
    for mine, other in zip(merged[1].layers, plain.layers, strict=True):
        assert mine.output_error != other.output_error
        assert mine.output_error < 1.05 * other.output_error


@pytest.mark.parametrize("options", [{"layout": "mapped"}, {"layout": "full"}, {"propagate": "merged"}], ids=str)
@pytest.mark.parametrize("name", ["deepseek-fp8", "gpt-oss-mxfp4"])
def test_every_layout_keeps_the_format(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = BUILDERS[name](tmp_path / "source")
    method = {"refit": "down"} if "propagate" in options else {}
    run(source, tmp_path / "result", KEPT, preset="hc-smoe", **options, **method)
    before, after = stored(source), stored(tmp_path / "result")
    assert {tensor.dtype for tensor in after.values()} == {tensor.dtype for tensor in before.values()}
    check_structure(tmp_path / "result")


@pytest.mark.parametrize("name", BUILDERS)
def test_bfloat16_is_the_decoded_model(name: str, tmp_path: Path) -> None:
    source = BUILDERS[name](tmp_path / "source")
    report = run(source, tmp_path / "result", EXPERTS, preset="reap", dtype="bfloat16")
    assert any("written in bfloat16" in warning for warning in report.warnings)
    assert "quantization_config" not in json.loads((tmp_path / "result" / "config.json").read_text())
    logical, after = read_model(LocalSource(source)).tensors, stored(tmp_path / "result")
    assert after.keys() == logical.keys()
    before = stored(source)
    for name, tensor in logical.items():
        parts = {role: before[part.name] for role, part in tensor.parts.items()}
        assert same_bytes(after[name], parts[""] if tensor.codec is None else tensor.codec.decode(parts))
    verify(tmp_path / "result", against=LocalSource(source))


@pytest.mark.parametrize("name", ["qwen3-fp8", "gpt-oss-mxfp4"])
def test_transformers_reads_a_result_as_it_reads_its_source(name: str, tmp_path: Path) -> None:
    source = BUILDERS[name](tmp_path / "source")
    run(source, tmp_path / "result", EXPERTS, preset="hc-smoe")
    ids = torch.arange(24).view(2, 12)
    logits = []
    for folder in (source, tmp_path / "result"):
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            logits.append(model.eval()(ids, use_cache=False).logits)
    assert torch.equal(*logits)


def test_static_scales_of_activations_follow_their_experts(tmp_path: Path) -> None:
    source = BUILDERS["static-fp8"](tmp_path / "source")
    report = run(source, tmp_path / "result", KEPT, preset="hc-smoe")
    before, after = stored(source), stored(tmp_path / "result")
    for layer in report.layers:
        for new in range(KEPT):
            members = [expert for expert, label in enumerate(layer.labels) if label == new]
            name = f"model.layers.{layer.layer}.mlp.experts.{{}}.down_proj.input_scale"
            largest = max(before[name.format(member)] for member in members)
            assert after[name.format(new)] == largest


@pytest.mark.parametrize("name", ["channel-fp8", "gpt-oss-mxfp4"])
def test_a_refit_in_the_format_is_at_most_five_percent_worse_than_in_bfloat16(name: str, tmp_path: Path) -> None:
    source = BUILDERS[name](tmp_path / "source")
    mine, plain = (
        run(source, tmp_path / f"in-{dtype}", KEPT, tokens=2400, dtype=dtype) for dtype in ("source", "bfloat16")
    )
    assert any(layer.refit is not None and layer.refit.is_kept for layer in mine.layers)
    for layer, other in zip(mine.layers, plain.layers, strict=True):
        assert layer.output_error <= 1.05 * other.output_error


# Experts of fewer neurons

WIDTHS = {"kimi-int4": 32, "gpt-oss-mxfp4": 64, "deepseek-fp8": 40, "qwen3-fp8": 96}


@pytest.fixture(scope="module")
def narrowed(source: Path) -> tuple[Path, ConversionReport]:
    """All experts, with about half of their neurons, as the format and shared experts allow."""
    folder = source.with_name("narrowed")
    return folder, run(source, folder, None, preset="hc-smoe", expert_width=WIDTHS.get(source.name, 16))


def test_narrower_experts_keep_the_format_and_weigh_what_was_planned(
    source: Path, narrowed: tuple[Path, ConversionReport], tmp_path: Path
) -> None:
    folder, report = narrowed
    width = WIDTHS.get(source.name, 16)
    assert report.experts["width_after"] == width
    before, after = stored(source), stored(folder)
    assert after.keys() == before.keys()
    assert all(after[name].dtype == before[name].dtype for name in after)
    options = wanted(tmp_path / "other", None, folder.with_suffix(".npy"), preset="hc-smoe", expert_width=width)
    assert planned_bytes(plan(source, options))["after"] == weight_bytes(folder) == report.weights_bytes["after"]
    assert verify(folder, against=LocalSource(source)).weights_bytes == weight_bytes(folder)


def test_what_is_not_a_routed_expert_is_copied_next_to_narrower_ones(
    source: Path, narrowed: tuple[Path, ConversionReport]
) -> None:
    before, after = stored(source), stored(narrowed[0])
    others = [name for name in before if ".experts." not in name]
    assert others
    assert all(same_bytes(before[name], after[name]) for name in others)


def test_narrower_experts_decode_to_neurons_of_the_source(
    source: Path, narrowed: tuple[Path, ConversionReport]
) -> None:
    """Every column of a down projection is, but for rounding to new blocks, one of the source's."""
    columns = []
    for folder in (source, narrowed[0]):
        logical, found = read_model(LocalSource(folder)).tensors, stored(folder)
        name = next(name for name in logical if ".experts" in name and "down_proj" in name and "bias" not in name)
        tensor = logical[name]
        assert tensor.codec is not None
        values = tensor.codec.decode({role: found[part.name] for role, part in tensor.parts.items()}).float()
        columns.append(values[0] if values.dim() == 3 else values.T)
    before, after = columns
    error = torch.cdist(after, before).min(1)
    assert (error.values <= 0.2 * after.norm(dim=1).clamp(min=before.norm(dim=1).mean())).all()
    assert (error.indices.diff() > 0).all()
