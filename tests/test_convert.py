"""Whole conversions of tiny checkpoints: what is read, what is written, and what the report says."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    LENGTH,
    build,
    change_tensors,
    contents,
    differing,
    options,
    read_config,
    read_tensors,
    same_bits,
    token_ids,
    write_tensors,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hcsmoe_hub import ConvertOptions, convert, execute
from hcsmoe_hub import plan as plan_conversion
from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.checkpoint.tensors import StoredTensor
from hcsmoe_hub.events import Event, StageAdvanced, StageFinished, StageStarted, Warned

MODEL_TYPES = ["mixtral", "qwen3_moe", "deepseek_v3"]
EXPERTS = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"
MATRICES = ("w1", "w2", "w3")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Mixtral: 2 layers, 8 experts, 2 per token."""
    return build(tmp_path / "model")


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """Where conversions write."""
    return tmp_path / "result"


# The streamed pass


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_streamed_forward_is_the_model_s_own(tmp_path: Path, model_type: str) -> None:
    source = build(tmp_path / "model", model_type)
    # Whether a conversion can be continued is found out by another forward.
    plan = plan_conversion(source, options(source, 4, batch_tokens=3 * LENGTH, checkpoint=False))
    streamed: list[Tensor] = []

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        streamed.append(output.last_hidden_state)

    plan.model.skeleton.module.base_model.register_forward_hook(remember)
    execute(plan)
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        expected = model.base_model(token_ids()).last_hidden_state
    assert len(streamed) == 1
    torch.testing.assert_close(streamed[0], expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], set[TensorReader]]:
    """How often each tensor is read, and the readers that did it."""
    counts: Counter[str] = Counter()
    readers: set[TensorReader] = set()
    read = TensorReader.read

    def counting(reader: TensorReader, tensor: StoredTensor, into: Tensor | None = None) -> Tensor:
        counts[tensor.name] += 1
        readers.add(reader)
        return read(reader, tensor, into)

    monkeypatch.setattr(TensorReader, "read", counting)
    return counts, readers


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("experts", [4, 8])
def test_every_weight_byte_is_read_once(
    tmp_path: Path, model_type: str, experts: int, reads: tuple[Counter[str], set[TensorReader]]
) -> None:
    source = build(tmp_path / "model", model_type)
    change_tensors(source, lambda tensors: tensors.update({"vision_tower.weight": torch.ones(9)}))
    convert(source, options(source, experts, batch_tokens=LENGTH))
    tensors = read_tensors(source)
    counts, readers = reads
    assert counts == dict.fromkeys(tensors, 1)
    assert sum(reader.bytes_read for reader in readers) == sum(tensor.nbytes for tensor in tensors.values())


def test_what_is_dropped_is_not_read(tmp_path: Path, reads: tuple[Counter[str], set[TensorReader]]) -> None:
    source = build(tmp_path / "model", "deepseek_v3")
    change_tensors(
        source, lambda tensors: tensors.update({"model.layers.3.mlp.experts.0.up_proj.weight": torch.ones(9)})
    )
    report = convert(source, options(source, 4))
    assert report.dropped_tensors.keys() == read_tensors(source).keys() - reads[0].keys()
    assert len(report.dropped_tensors) == 1


# Identity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("as_published", [True, False], ids=["per_expert", "fused"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_as_many_experts_as_before_give_every_file_back(
    tmp_path: Path, result: Path, model_type: str, as_published: bool, dtype: torch.dtype
) -> None:
    source = build(tmp_path / "model", model_type, dtype=dtype, as_published=as_published)
    report = convert(source, options(source, 8))
    assert differing(read_tensors(result), read_tensors(source)) == []
    assert (result / "config.json").read_bytes() == (source / "config.json").read_bytes()
    for layer in report.layers:
        assert layer.labels == layer.dominant == list(range(8))
        assert (layer.merge_heights, layer.output_error, layer.router.top_k_agreement) == ([], 0.0, 1.0)


def widen_routers_and_norms(source: Path) -> None:
    """Stores routers and norms in float32, with digits that bfloat16 cannot hold, inside a bfloat16 checkpoint."""

    def widen(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if ".gate." in name or "norm" in name:
                tensors[name] = torch.randn(tensors[name].shape, dtype=torch.float32)

    change_tensors(source, widen)


def test_float32_routers_in_a_bfloat16_checkpoint_keep_their_bits(tmp_path: Path, result: Path) -> None:
    source = build(tmp_path / "model", dtype=torch.bfloat16)
    widen_routers_and_norms(source)
    convert(source, options(source, 8))
    assert differing(read_tensors(result), read_tensors(source)) == []


def test_every_tensor_keeps_its_dtype_when_experts_are_merged(tmp_path: Path, result: Path) -> None:
    source = build(tmp_path / "model", dtype=torch.bfloat16)
    widen_routers_and_norms(source)
    report = convert(source, options(source, 4))
    before, after = read_tensors(source), read_tensors(result)
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: before[name].dtype for name in after}
    for layer in report.layers:
        name = ROUTER.format(layer.layer)
        assert same_bits(after[name], before[name][layer.dominant])


# What is written


def test_expert_by_expert_stays_expert_by_expert(source: Path, result: Path) -> None:
    convert(source, options(source, 3))
    removed = {EXPERTS.format(layer, expert, name) for layer in (0, 1) for expert in range(3, 8) for name in MATRICES}
    assert read_tensors(result).keys() == read_tensors(source).keys() - removed


def test_fused_stays_fused(tmp_path: Path, result: Path) -> None:
    source = build(tmp_path / "model", "qwen3_moe", as_published=False)
    convert(source, options(source, 3))
    before, after = read_tensors(source), read_tensors(result)
    assert before.keys() == after.keys()
    changed = {name for name in after if after[name].shape != before[name].shape}
    parts = ("experts.gate_up_proj", "experts.down_proj", "gate.weight")
    assert changed == {f"model.layers.{layer}.mlp.{part}" for layer in (0, 1) for part in parts}
    assert all(after[name].shape == (3, *before[name].shape[1:]) for name in changed)


def test_a_merged_expert_is_the_mean_of_its_members_by_their_usage(source: Path, result: Path) -> None:
    report = convert(source, options(source, 4))
    before, after = read_tensors(source), read_tensors(result)
    for layer in report.layers:
        for cluster in range(4):
            members = [expert for expert, label in enumerate(layer.labels) if label == cluster]
            total = sum(layer.usage[expert] for expert in members)
            for matrix in MATRICES:
                parts = [before[EXPERTS.format(layer.layer, expert, matrix)] for expert in members]
                shares = [layer.usage[expert] / total for expert in members]
                expected = sum(part * share for part, share in zip(parts, shares, strict=True))
                torch.testing.assert_close(after[EXPERTS.format(layer.layer, cluster, matrix)], expected)


def test_everything_but_experts_and_routers_keeps_its_bits(tmp_path: Path, result: Path) -> None:
    source = build(tmp_path / "model", "deepseek_v3", dtype=torch.bfloat16)
    convert(source, options(source, 4))
    before, after = read_tensors(source), read_tensors(result)
    others = {name for name in before if ".experts." not in name and ".gate." not in name}
    assert [name for name in others if not same_bits(after[name], before[name])] == []


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_result_loads_with_plain_from_pretrained(tmp_path: Path, result: Path, model_type: str) -> None:
    source = build(tmp_path / "model", model_type)
    convert(source, options(source, 4, experts_per_token=1))
    model, found = AutoModelForCausalLM.from_pretrained(result, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_experts_per_tok == 1
    with torch.no_grad():
        assert model(token_ids()).logits.isfinite().all()


def test_two_conversions_give_the_same_bytes(source: Path) -> None:
    folders = [source.parent / name for name in ("first", "second")]
    for folder in folders:
        convert(source, options(source, 4, output=folder, max_shard_size="40KB"))
    first, second = map(contents, folders)
    reports = [json.loads(files.pop("hcsmoe.json")) for files in (first, second)]
    cards = [files.pop("README.md").decode() for files in (first, second)]
    assert "# first" in cards[0]
    assert "# second" in cards[1]
    assert first == second
    assert len(first) > 4
    for report in reports:
        assert report.pop("timings_seconds").keys() == {"calibration", "convert"}
        assert report.pop("peak_memory_bytes")["process"] > 0
    assert reports[0] == reports[1]


@pytest.mark.parametrize("stored_twice", [False, True])
def test_tied_embeddings_stay_as_they_were_stored(tmp_path: Path, result: Path, stored_twice: bool) -> None:
    source = build(tmp_path / "model", tie_word_embeddings=True)
    assert "lm_head.weight" not in read_tensors(source)
    if stored_twice:
        name = "model.embed_tokens.weight"
        change_tensors(source, lambda tensors: tensors.update({"lm_head.weight": tensors[name].clone()}))
    plan = plan_conversion(source, options(source, 4))
    model = AutoModelForCausalLM.from_pretrained(source)
    assert plan.model.parameters == sum(parameter.numel() for parameter in model.parameters())
    execute(plan)
    before, after = read_tensors(source), read_tensors(result)
    assert ("lm_head.weight" in after) is stored_twice
    assert all(same_bits(after[name], before[name]) for name in after if "embed" in name or "lm_head" in name)


def test_a_source_of_one_file_is_converted(source: Path, result: Path) -> None:
    tensors = read_tensors(source)
    write_tensors(source, tensors, shards=1)
    (source / "model-00001-of-00001.safetensors").rename(source / "model.safetensors")
    (source / "model.safetensors.index.json").unlink()
    convert(source, options(source, 8))
    assert differing(read_tensors(result), tensors) == []


# Experts that no token reaches


@pytest.fixture
def idle(tmp_path: Path) -> Path:
    """A Mixtral whose experts 4 to 7 are never chosen, and so alike that they are merged with each other."""
    source = build(tmp_path / "model")

    def silence(tensors: dict[str, Tensor]) -> None:
        for layer in (0, 1):
            # Of two opposite rows one always has a positive logit, so zeros are never among the best two of four.
            a, b = torch.randn(2, 32)
            tensors[ROUTER.format(layer)] = torch.stack([a, -a, b, -b, *torch.zeros(4, 32)])
            for matrix in MATRICES:
                for expert in (5, 6, 7):
                    change = 1e-3 * torch.randn(tensors[EXPERTS.format(layer, 4, matrix)].shape)
                    tensors[EXPERTS.format(layer, expert, matrix)] = tensors[EXPERTS.format(layer, 4, matrix)] + change

    change_tensors(source, silence)
    return source


def test_a_cluster_that_no_token_reached_is_merged_equally_with_a_warning(idle: Path, result: Path) -> None:
    events: list[Event] = []
    report = convert(idle, options(idle, 5), listener=events.append)
    expected = [f"layer {layer}: no calibration token reached experts 4, 5, 6, 7; merged equally." for layer in (0, 1)]
    assert report.warnings == expected == [event.message for event in events if isinstance(event, Warned)]
    before, after = read_tensors(idle), read_tensors(result)
    for layer in report.layers:
        assert layer.labels == [0, 1, 2, 3, 4, 4, 4, 4]
        assert layer.usage[4:] == layer.saliency[4:] == [0, 0, 0, 0]
        for matrix in MATRICES:
            parts = [before[EXPERTS.format(layer.layer, expert, matrix)] for expert in range(4, 8)]
            mean = torch.stack(parts).mean(0)
            torch.testing.assert_close(after[EXPERTS.format(layer.layer, 4, matrix)], mean, rtol=1e-6, atol=1e-7)


def test_single_experts_that_no_token_reached_keep_their_bits_without_a_warning(idle: Path, result: Path) -> None:
    report = convert(idle, options(idle, 8))
    assert [message for message in report.warnings if "reached" in message] == []
    assert differing(read_tensors(result), read_tensors(idle)) == []


# Events


def test_events_tell_the_stages_in_order(source: Path) -> None:
    events: list[Event] = []
    report = convert(source, options(source, 2), listener=events.append)
    assert [event.message for event in events if isinstance(event, Warned)] == report.warnings
    started = [(event.stage.value, event.total) for event in events if isinstance(event, StageStarted)]
    assert started == [("calibration", 1), ("convert", 2), ("verify", 1)]
    finished = {event.stage.value: event.seconds for event in events if isinstance(event, StageFinished)}
    assert finished == report.timings_seconds
    layers = [event for event in events if isinstance(event, StageAdvanced)]
    assert [event.detail for event in layers] == ["layer 0", "layer 1"]
    assert 0 < layers[0].bytes_written < layers[1].bytes_written == report.weights_bytes["after"]


def test_a_conversion_can_be_planned_from_words_or_paths(source: Path) -> None:
    wanted: ConvertOptions = options(source, 4)
    assert plan_conversion(str(source), wanted).config == plan_conversion(source, wanted).config
    assert read_config(source)["num_local_experts"] == 8


def test_fused_and_per_expert_sources_of_the_same_model_give_the_same_model(tmp_path: Path) -> None:
    per_expert = build(tmp_path / "model", "qwen3_moe")
    fused = build(tmp_path / "fused", "qwen3_moe", as_published=False)
    first = convert(per_expert, options(per_expert, 3, output=tmp_path / "from-per-expert"))
    second = convert(fused, options(fused, 3, output=tmp_path / "from-fused"))
    for one, other in zip(first.layers, second.layers, strict=True):
        assert (one.labels, one.usage) == (other.labels, other.usage)
    states = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("from-per-expert", "from-fused")
    ]
    assert differing(*states) == []
