"""A multi-token prediction (MTP) head survives: it runs on the same tokens, and its experts are reduced alike."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mtp_models import FAMILIES, build_with_head, head_keys, is_named, load_head, mtp_logits, run_head
from published.catalogue import CHECKPOINTS
from published.test_conversions import load_here  # noqa: F401
from tiny_models import (
    build,
    change_config,
    change_tensors,
    differing,
    options,
    read_config,
    read_tensors,
    refuse,
    token_ids,
)
from torch import Tensor
from transformers.modeling_layers import MtpModel

from hcsmoe_hub import convert
from hcsmoe_hub import plan as plan_conversion
from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.cli.documents import model_document, plan_document
from hcsmoe_hub.errors import PlanError, SourceError, VerificationError
from hcsmoe_hub.model.source_model import read_model
from hcsmoe_hub.model_cards import write_card
from hcsmoe_hub.observation.statistics_file import StatisticsFile
from hcsmoe_hub.options import MethodOptions, Mtp, Preset
from hcsmoe_hub.planning.sizes import active_parameters, projections, weight_bytes
from hcsmoe_hub.result.verify import check_structure, verify

# Verification in this process, which has imported its libraries already.
pytestmark = pytest.mark.usefixtures("load_here")

KEPT = 4
# transformers 5.23 does not run the heads of decoders with an indexer.
RUNNABLE = ["deepseek_v3", "glm4_moe", "glm4_moe_lite", "qwen3_next", "qwen3_5_moe_text"]
Source = Callable[[str], Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A checkpoint with a head, by its architecture; not to be changed."""
    found: dict[str, Path] = {}

    def find(model_type: str) -> Path:
        if model_type not in found:
            found[model_type] = build_with_head(tmp_path_factory.mktemp(model_type) / "model", model_type)
        return found[model_type]

    return find


def hidden_states(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Hidden states ``[B, S - 1, H]`` of the first tokens, after the final norm."""
    with torch.no_grad():
        return model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]


# What comes out


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_head_is_kept_bit_for_bit_with_all_experts(source: Source, tmp_path: Path, model_type: str) -> None:
    report = convert(source(model_type), options(source(model_type), 8, output=tmp_path))
    assert report.dropped_tensors == {}
    assert differing(read_tensors(tmp_path), read_tensors(source(model_type))) == []
    assert read_config(tmp_path) == read_config(source(model_type))


@pytest.mark.parametrize("model_type", RUNNABLE)
def test_logits_of_a_head_do_not_change_with_all_experts(source: Source, tmp_path: Path, model_type: str) -> None:
    convert(source(model_type), options(source(model_type), 8, output=tmp_path))
    ids = token_ids()
    model, head = load_head(source(model_type))
    _, written = load_head(tmp_path)
    hidden = hidden_states(model, ids)
    assert torch.equal(mtp_logits(written, hidden, ids), mtp_logits(head, hidden, ids))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_experts_of_a_head_are_reduced_like_those_of_a_layer(
    source: Source, tmp_path: Path, model_type: str
) -> None:
    start, before = source(model_type), head_keys(source(model_type))
    report = convert(start, options(start, KEPT, output=tmp_path))
    assert (report.dropped_tensors, report.warnings) == ({}, [])
    assert report.layers[-1].layer == 2
    assert 0 < report.layers[-1].output_error < 2
    after = head_keys(tmp_path)
    assert {key for key in before if ".experts." not in key} == {key for key in after if ".experts." not in key}
    gate = next(key for key in after if key.endswith("mlp.gate.weight"))
    assert read_tensors(tmp_path)[gate].shape[0] == KEPT
    counts = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_hidden_layers")
    assert {key: read_config(tmp_path).get(key) for key in counts} == {
        key: read_config(start).get(key) for key in counts
    }
    check_structure(tmp_path)


@pytest.mark.parametrize("experts", [KEPT, 8])
def test_a_head_in_eight_bits_is_reduced_in_eight_bits(tmp_path: Path, experts: int) -> None:
    (tmp_path / "model").mkdir()
    start = CHECKPOINTS["DeepSeek-V3"].write_tiny(tmp_path / "model")
    result, ids = tmp_path / "result", token_ids()
    assert convert(start, options(start, experts)).dropped_tensors == {}
    before, after = read_tensors(start), read_tensors(result)
    assert {after[key].dtype for key in head_keys(result)} == {before[key].dtype for key in head_keys(start)}
    # transformers runs eight bits on an accelerator only.
    wide = {"dtype": "bfloat16", "method": MethodOptions(preset="hc-smoe")}
    convert(start, options(start, 8, output=tmp_path / "wide start", **wide))
    convert(result, options(result, experts, output=tmp_path / "wide result", **wide))
    model, head = load_head(tmp_path / "wide start")
    hidden = hidden_states(model, ids)
    logits = mtp_logits(load_head(tmp_path / "wide result")[1], hidden, ids)
    assert logits.isfinite().all()
    assert torch.equal(logits, mtp_logits(head, hidden, ids)) == (experts == 8)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_next"])
def test_transformers_runs_a_reduced_head(source: Source, tmp_path: Path, model_type: str) -> None:
    convert(source(model_type), options(source(model_type), KEPT, output=tmp_path))
    logits = run_head(*load_head(tmp_path), token_ids())
    assert logits.isfinite().all()
    assert not torch.equal(logits, run_head(*load_head(source(model_type)), token_ids()))


# What it is observed on


def chosen_experts(folder: Path) -> Tensor:
    """How often the router of a head chooses each expert on the calibration tokens, as transformers runs it."""
    model, head = load_head(folder)
    seen: list[Tensor] = []

    def watch(module: torch.nn.Module, args: object, output: tuple[Tensor, ...]) -> None:
        seen.append(output[-1] if output[-1].dtype == torch.int64 else output[0])

    router = next(module for name, module in head.named_modules() if name.endswith("mlp.gate"))
    router.register_forward_hook(watch)
    run_head(model, head, token_ids())
    return seen[0]


def test_a_head_sees_what_transformers_shows_it(source: Source, tmp_path: Path) -> None:
    start, file = source("qwen3_next"), tmp_path / "statistics"
    convert(start, options(start, KEPT, output=tmp_path / "result", statistics=file))
    statistics = StatisticsFile(file).layer(2)
    chosen = chosen_experts(start)
    assert statistics.usage_E.tolist() == torch.bincount(chosen.flatten(), minlength=8).tolist()
    assert (statistics.tokens, len(chosen.reshape(-1, 2))) == (60, 60)


def inputs_of_experts(model: torch.nn.Module, head: MtpModel) -> Tensor:
    """Inputs of a head's MoE block on the calibration tokens, ``[T, H]``."""
    seen: list[Tensor] = []
    head.layers[0].mtp_block.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    run_head(model, head, token_ids())
    return seen[0]


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_the_experts_of_a_head_get_the_inputs_that_transformers_gives_them(
    source: Source, tmp_path: Path, model_type: str
) -> None:
    start, file = source(model_type), tmp_path / "statistics"
    convert(start, options(start, KEPT, output=tmp_path / "result", statistics=file))
    sample = StatisticsFile(file).layer(2).sample
    assert sample is not None
    torch.testing.assert_close(sample.args[0][0], inputs_of_experts(*load_head(start)))


@pytest.mark.parametrize("preset", [Preset.HC_SMOE, Preset.HC_REFIT])
def test_statistics_of_a_head_serve_a_later_conversion(source: Source, tmp_path: Path, preset: Preset) -> None:
    start, file = source("deepseek_v3"), tmp_path / "statistics"
    for name, statistics in (("direct", None), ("first", file), ("second", file)):
        method = MethodOptions(preset=preset)
        convert(start, options(start, KEPT, output=tmp_path / name, statistics=statistics, method=method))
    for name in ("first", "second"):
        assert differing(read_tensors(tmp_path / name), read_tensors(tmp_path / "direct")) == []


def test_statistics_without_the_head_are_refused_where_it_is_kept(source: Source, tmp_path: Path) -> None:
    start, file = source("deepseek_v3"), tmp_path / "statistics"
    convert(start, options(start, KEPT, output=tmp_path / "first", statistics=file, mtp=Mtp.DROP))
    error = refuse(start, PlanError, options(start, KEPT, statistics=file))
    assert "was collected without the MTP head" in error.message
    assert "`mtp='drop'`" in error.hint


def test_statistics_with_the_head_serve_a_conversion_without_it(source: Source, tmp_path: Path) -> None:
    start, file = source("deepseek_v3"), tmp_path / "statistics"
    convert(start, options(start, KEPT, output=tmp_path / "first", statistics=file))
    dropped = convert(start, options(start, KEPT, output=tmp_path / "second", statistics=file, mtp=Mtp.DROP))
    assert [layer.layer for layer in dropped.layers] == [1]


@pytest.mark.parametrize(("sequences", "length"), [(4, 16), (5, 11), (5, 10), (9, 10), (10, 10), (1, 3)])
def test_a_head_of_the_reduced_model_sees_its_hidden_states(
    source: Source, tmp_path: Path, sequences: int, length: int
) -> None:
    start = source("deepseek_v3")
    method = MethodOptions(preset="hc-refit", propagate="merged")
    wanted = options(start, KEPT, output=tmp_path, method=method, ids=token_ids(sequences, length), batch_tokens=8)
    report = convert(start, wanted)
    assert [layer.layer for layer in report.layers] == [1, 2]
    assert report.warnings == []


def test_micro_batches_do_not_change_a_head(source: Source, tmp_path: Path) -> None:
    start = source("qwen3_next")
    for tokens in (16, 1024):
        convert(start, options(start, KEPT, output=tmp_path / str(tokens), batch_tokens=tokens))
    found, expected = (read_tensors(tmp_path / str(tokens)) for tokens in (16, 1024))
    for name in head_keys(tmp_path / "16"):
        torch.testing.assert_close(found[name], expected[name])


def test_a_head_is_read_after_the_last_layer(source: Source) -> None:
    start = source("qwen3_next")
    plan = plan_conversion(start, options(start, KEPT))
    assert {tensor.name for tensor in plan.reading_order[-2]} == head_keys(start)


def test_a_head_needs_two_tokens_of_a_sequence(source: Source) -> None:
    start = source("qwen3_next")
    error = refuse(start, PlanError, options(start, KEPT, ids=token_ids(4, 1)))
    assert "takes a token and the next one" in error.message


# Layouts and budgets


def test_a_budget_gives_a_head_its_own_number_of_experts(source: Source, tmp_path: Path) -> None:
    start = source("deepseek_v3")
    method = MethodOptions(preset="hc-smoe", layout="full", budget="frequency")
    report = convert(start, options(start, KEPT, output=tmp_path, method=method))
    assert sum(layer.experts for layer in report.layers) == 2 * KEPT
    assert {name: tensor.shape for name, tensor in read_tensors(tmp_path).items()} == {
        name: tensor.shape for name, tensor in read_tensors(start).items()
    }
    check_structure(tmp_path)


def test_the_mapped_layout_keeps_a_head_as_it_is(source: Source, tmp_path: Path) -> None:
    start = source("qwen3_next")
    report = convert(start, options(start, KEPT, output=tmp_path, method=MethodOptions(layout="mapped")))
    assert report.warnings == ["the mapped layout keeps the MTP head as it is, with all 8 experts."]
    found, expected = read_tensors(tmp_path), read_tensors(start)
    assert differing({name: found[name] for name in head_keys(start)}, {n: expected[n] for n in head_keys(start)}) == []
    check_structure(tmp_path)


# Heads that are dropped, or only copied


@pytest.mark.parametrize("experts", [KEPT, 8])
def test_a_head_is_dropped_if_that_is_asked_for(source: Source, tmp_path: Path, experts: int) -> None:
    start = source("deepseek_v3")
    report = convert(start, options(start, experts, output=tmp_path, mtp="drop"))
    assert report.dropped_tensors == dict.fromkeys(head_keys(start), "MTP head, dropped as `mtp='drop'` asks")
    assert not head_keys(start) & read_tensors(tmp_path).keys()
    assert read_config(tmp_path)["num_nextn_predict_layers"] == 0
    assert verify(tmp_path, against=LocalSource(start)).moe_layers == 1


def test_a_source_without_a_head_has_none_to_drop(tmp_path: Path) -> None:
    start = build(tmp_path / "model")
    error = refuse(start, PlanError, options(start, KEPT, mtp="drop"))
    assert "stores no MTP head" in error.message


ERNIE = ("model.mtp_emb_norm.0.", "model.mtp_linear_proj.0.", "model.mtp_block.0.mlp.gate_proj.")


@pytest.mark.parametrize("prefixes", [ERNIE, ("model.mtp.layers.0.mlp.up_proj.", "model.mtp.layers.1.enorm.")])
def test_a_dense_head_is_copied_or_dropped(tmp_path: Path, prefixes: tuple[str, ...]) -> None:
    start = build(tmp_path / "model")
    extra = {f"{prefix}weight": torch.randn(4, 4) for prefix in prefixes}
    change_tensors(start, lambda tensors: tensors.update(extra))
    change_config(start, num_nextn_predict_layers=1)
    report = convert(start, options(start, KEPT))
    assert report.dropped_tensors == {}
    written = read_tensors(tmp_path / "result")
    assert differing({name: written[name] for name in extra}, extra) == []
    assert read_config(tmp_path / "result")["num_nextn_predict_layers"] == 1
    verify(tmp_path / "result", against=LocalSource(start))
    dropped = plan_conversion(start, options(start, KEPT, mtp="drop", output=tmp_path / "other"))
    assert dropped.account.dropped.keys() == extra.keys()


def test_a_head_with_another_number_of_experts_is_dropped(tmp_path: Path) -> None:
    start = build_with_head(tmp_path / "model", "deepseek_v3")
    change_tensors(
        start, lambda tensors: tensors.update({"model.layers.2.mlp.experts.8.up_proj.weight": torch.ones(24, 32)})
    )
    plan = plan_conversion(start, options(start, KEPT))
    assert plan.account.dropped.keys() == head_keys(start)
    assert plan.warnings == [f"{len(head_keys(start))} tensors dropped: {plan.account.dropped.popitem()[1]}."]
    assert "MTP head with experts of its own, but tensor 'model.layers.2.mlp.experts." in plan.warnings[0]


def test_a_head_with_a_missing_expert_is_dropped(tmp_path: Path) -> None:
    start = build_with_head(tmp_path / "model", "qwen3_next")
    change_tensors(start, lambda tensors: tensors.pop("mtp.layers.0.mlp.experts.3.up_proj.weight"))
    reasons = set(plan_conversion(start, options(start, KEPT)).account.dropped.values())
    assert len(reasons) == 1
    assert "but tensor " in reasons.pop()


# Counts and checks


def test_a_head_is_counted_alike_everywhere(source: Source, tmp_path: Path) -> None:
    start = source("deepseek_v3")
    report = convert(start, options(start, KEPT, output=tmp_path))
    model = read_model(LocalSource(start))
    plain = read_model(LocalSource(start), with_mtp=False)
    plan = plan_document(plan_conversion(start, options(start, KEPT)))
    documents = [report.as_dict(), plan, model_document(model)]
    counts = [(each["experts"]["moe_layers"], each["experts"]["mtp_layers"]) for each in documents]
    assert counts == [(1, 1)] * 3
    before = sum(tensor.numel() for tensor in read_tensors(start).values())
    after = sum(tensor.numel() for tensor in read_tensors(tmp_path).values())
    assert model.parameters == plain.parameters == before
    assert report.parameters == plan["parameters"] == {"before": before, "after": after}
    assert report.active_parameters["before"] == active_parameters(plain) == active_parameters(model)
    (half,) = [each for each in model_document(model)["projections"] if each["experts"] == KEPT]
    assert half["weights_bytes"] == pytest.approx(report.weights_bytes["after"], rel=0.01)
    assert half["parameters"] == pytest.approx(after, rel=0.01)


def test_what_is_left_of_a_model_is_shown_without_a_head_that_would_be_dropped(tmp_path: Path) -> None:
    start = build_with_head(tmp_path / "model", "qwen3_next")
    change_tensors(start, lambda tensors: tensors.pop("mtp.fc.weight"))
    model, plan = read_model(LocalSource(start)), plan_conversion(start, options(start, KEPT))
    (half,) = [each for each in projections(model) if each.experts == KEPT]
    assert half.parameters == pytest.approx(plan.parameters_after, rel=0.01)
    assert half.weights_bytes == pytest.approx(weight_bytes(plan)["after"], rel=0.01)


def test_a_card_names_the_head(source: Source, tmp_path: Path) -> None:
    start = source("qwen3_next")
    convert(start, options(start, KEPT, output=tmp_path))
    text = write_card(tmp_path, None, overwrite=True).path.read_text()
    assert "each of its 2 MoE layers and of its multi-token prediction head" in " ".join(text.split())
    assert "| 2 (MTP head) |" in text


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_next"])
def test_a_result_is_verified_with_its_head(source: Source, tmp_path: Path, model_type: str) -> None:
    start = source(model_type)
    convert(start, options(start, KEPT, output=tmp_path))
    assert verify(tmp_path, against=LocalSource(start)).experts == KEPT
    prefix = "mtp." if is_named(model_type) else "model.layers.2."
    norm = f"{prefix}norm.weight" if is_named(model_type) else f"{prefix}shared_head.norm.weight"
    change_tensors(tmp_path, lambda tensors: tensors.update({norm: tensors[norm] + 1}))
    with pytest.raises(VerificationError, match="differs from"):
        verify(tmp_path, against=LocalSource(start))


def test_a_result_whose_head_is_damaged_fails(source: Source, tmp_path: Path) -> None:
    start = source("deepseek_v3")
    convert(start, options(start, KEPT, output=tmp_path))
    change_tensors(tmp_path, lambda tensors: tensors.pop("model.layers.2.mlp.experts.3.up_proj.weight"))
    with pytest.raises((VerificationError, SourceError), match=r"layer 2, which is not an MoE layer .*experts\.3\."):
        check_structure(tmp_path)
