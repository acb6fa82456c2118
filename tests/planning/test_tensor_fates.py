"""Every stored tensor is copied, rewritten or dropped with a reason; none is forgotten."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_models import build, change_config, change_tensors, differing, options, read_config, read_tensors, refuse
from torch import Tensor

from hcsmoe_hub import convert
from hcsmoe_hub import plan as plan_conversion
from hcsmoe_hub.errors import SourceError, UnsupportedModelError
from hcsmoe_hub.planning.tensor_fates import Account

REASON = "MTP head with experts of its own, "
ODD = REASON + "but its tensors are not those of the one head that deepseek_v3 has"
UNKNOWN = REASON + "and how a head of mixtral computes is not known"


def account(source: Path, experts: int) -> Account:
    """What a conversion would do with every tensor."""
    return plan_conversion(source, options(source, experts)).account


def add_tensors(source: Path, tensors: dict[str, Tensor]) -> None:
    """Stores more tensors in a checkpoint."""
    change_tensors(source, lambda stored: stored.update(tensors))


def prediction_layer(layer: int) -> dict[str, Tensor]:
    """A layer after the last one, with some of what DeepSeek-V3 publishes: experts, a router, norms, embeddings."""
    shapes = {
        "eh_proj.weight": (32, 64),
        "enorm.weight": (32,),
        "embed_tokens.weight": (64, 32),
        "mlp.gate.weight": (8, 32),
        "mlp.gate.e_score_correction_bias": (8,),
        "mlp.experts.0.gate_proj.weight": (24, 32),
        "mlp.experts.7.down_proj.weight": (32, 24),
        "shared_head.norm.weight": (32,),
    }
    return {f"model.layers.{layer}.{name}": torch.randn(shape) for name, shape in shapes.items()}


def vision_tower() -> dict[str, Tensor]:
    """What a text model does not load, in several dtypes."""
    return {
        "vision_tower.patch_embed.weight": torch.randn(4, 3, 2, 2),
        "vision_tower.blocks.0.norm.weight": torch.randn(5).bfloat16(),
        "vision_tower.blocks.1.attn.qkv.weight": torch.randn(6, 2),
        "vision_tower.position_ids": torch.arange(7),
        "multi_modal_projector.scale": torch.tensor(2.5),
    }


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_every_tensor_is_copied_or_rewritten_or_dropped(tmp_path: Path, model_type: str) -> None:
    source = build(tmp_path / "model", model_type)
    add_tensors(source, vision_tower() | {f"mtp.{name}": tensor for name, tensor in prediction_layer(0).items()})
    plan = plan_conversion(source, options(source, 4))
    rewritten = {name for names in plan.account.rewritten.values() for name in names}
    targets = {key: target for group in plan.model.groups.values() for key, target in group.targets.items()}
    fates = [plan.account.copied, plan.account.dropped.keys(), {key for key in targets if targets[key] in rewritten}]
    assert set.union(*map(set, fates)) == plan.model.source.tensors.keys()
    assert sum(map(len, fates)) == len(plan.model.source.tensors)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_only_experts_and_routers_are_rewritten(tmp_path: Path, model_type: str) -> None:
    source = build(tmp_path / "model", model_type)
    plan = plan_conversion(source, options(source, 4))
    others = {key for key in read_tensors(source) if ".experts." not in key and ".gate." not in key}
    assert plan.account.copied == others


def test_the_result_has_the_planned_tensors(tmp_path: Path) -> None:
    source = build(tmp_path / "model", "deepseek_v3")
    add_tensors(source, vision_tower())
    outputs = account(source, 4).outputs
    convert(source, options(source, 4))
    written = read_tensors(tmp_path / "result")
    assert {name: (dtype, shape) for name, dtype, shape in outputs} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in written.items()
    }
    assert len(outputs) == len(written)


# Multi-token prediction


def test_an_odd_prediction_layer_is_dropped_with_a_reason_when_experts_are_merged(tmp_path: Path) -> None:
    source = build(tmp_path / "model", "deepseek_v3")
    extra = prediction_layer(3)
    add_tensors(source, extra)
    report = convert(source, options(source, 4))
    assert report.dropped_tensors == dict.fromkeys(extra, ODD)
    assert f"{len(extra)} tensors dropped: {ODD}." in report.warnings
    assert not extra.keys() & read_tensors(tmp_path / "result").keys()
    assert read_config(source)["num_nextn_predict_layers"] == 1
    assert read_config(tmp_path / "result")["num_nextn_predict_layers"] == 0


def test_a_prediction_layer_is_kept_bit_for_bit_when_no_expert_is_merged(tmp_path: Path) -> None:
    source = build(tmp_path / "model", "deepseek_v3")
    add_tensors(source, prediction_layer(3))
    report = convert(source, options(source, 8))
    assert report.dropped_tensors == {}
    assert differing(read_tensors(tmp_path / "result"), read_tensors(source)) == []
    assert read_config(tmp_path / "result") == read_config(source)


def test_config_keeps_its_prediction_layers_when_none_was_stored(tmp_path: Path) -> None:
    source = build(tmp_path / "model", "deepseek_v3")
    convert(source, options(source, 4))
    assert read_config(tmp_path / "result")["num_nextn_predict_layers"] == 1


@pytest.mark.parametrize("prefix", ["mtp.", "model.mtp.", "mtp_block.", "mtp.layers.0."])
def test_a_prediction_head_next_to_the_decoder_is_dropped_or_kept(tmp_path: Path, prefix: str) -> None:
    source = build(tmp_path / "model")
    extra = {
        prefix + name: tensor for name, tensor in {"norm.weight": torch.ones(3), "experts.0.w": torch.ones(2)}.items()
    }
    add_tensors(source, extra)
    assert account(source, 4).dropped == dict.fromkeys(extra, UNKNOWN)
    kept = account(source, 8)
    assert kept.dropped == {}
    assert sorted(kept.unread) == sorted(extra)


# Tensors that the model does not load


def test_a_vision_tower_is_copied_bit_for_bit(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    extra = vision_tower()
    add_tensors(source, extra)
    report = convert(source, options(source, 4))
    written = read_tensors(tmp_path / "result")
    assert report.dropped_tensors == {}
    assert differing({name: written[name] for name in extra if name in written}, extra) == []


def test_a_vision_tower_deeper_than_the_decoder_is_no_prediction_layer(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    names = [f"vision_tower.{kind}.{number}.weight" for kind in ("layers", "blocks") for number in range(4)]
    add_tensors(source, {name: torch.randn(3) for name in names})
    found = account(source, 4)
    assert found.dropped == {}
    assert sorted(found.unread) == sorted(names)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.block_sparse_moe.experts.3.w4.weight",
        "model.layers.1.other.router.weight",
        "adapter.experts.gate_up_proj",
    ],
)
def test_a_tensor_that_looks_like_an_expert_but_is_not_loaded_is_refused(tmp_path: Path, name: str) -> None:
    source = build(tmp_path / "model")
    add_tensors(source, {name: torch.ones(3)})
    message = refuse(source, UnsupportedModelError, options(source, 4)).message
    assert f"tensor {name!r} looks like a part of an expert, but the model does not use it" in message


# A config that disagrees with the weights


class Damage(NamedTuple):
    """What is wrong with a checkpoint, and what the message must say of it."""

    apply: Callable[[Path], None]
    says: list[str]


def _drop(name: str) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder, lambda tensors: tensors.pop(name))


def _add(name: str, *shape: int) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder, lambda tensors: tensors.update({name: torch.ones(shape)}))


EXPERTS = "model.layers.0.block_sparse_moe.experts"
DAMAGES = {
    "hidden_size": Damage(lambda folder: change_config(folder, hidden_size=40), ["[48, 32]", "[48, 40]"]),
    "vocab_size": Damage(lambda folder: change_config(folder, vocab_size=65), ["[64, 32]", "[65, 32]"]),
    "more_experts_in_config": Damage(lambda folder: change_config(folder, num_local_experts=16), ["experts.8."]),
    "fewer_experts_in_config": Damage(lambda folder: change_config(folder, num_local_experts=4), ["layers.0"]),
    "fewer_layers_in_weights": Damage(lambda folder: change_config(folder, num_hidden_layers=3), ["layers.2"]),
    "missing_norm": Damage(_drop("model.layers.1.input_layernorm.weight"), ["model.layers.1.input_layernorm.weight"]),
    "missing_embedding": Damage(_drop("model.embed_tokens.weight"), ["model.embed_tokens.weight"]),
    "missing_expert": Damage(_drop(f"{EXPERTS}.5.w2.weight"), [f"{EXPERTS}."]),
    "missing_router": Damage(_drop("model.layers.1.block_sparse_moe.gate.weight"), ["model.layers.1.", "gate"]),
    "one_expert_more": Damage(_add(f"{EXPERTS}.8.w1.weight", 48, 32), [f"{EXPERTS}."]),
    "router_rows": Damage(_add("model.layers.1.block_sparse_moe.gate.weight", 9, 32), ["[9, 32]", "[8, 32]"]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_config_that_disagrees_with_the_weights_is_refused(tmp_path: Path, damage: Damage) -> None:
    source = build(tmp_path / "model")
    damage.apply(source)
    error = refuse(source, SourceError, options(source, 4))
    assert [text for text in damage.says if text not in error.message] == []
    assert "do not belong together" in error.hint


def test_fused_experts_of_another_number_than_the_config_says_are_refused(tmp_path: Path) -> None:
    model = build(tmp_path / "model", "qwen3_moe", as_published=False)
    change_config(model, num_experts=6, num_local_experts=6)
    message = refuse(model, SourceError, options(model, 4)).message
    assert re.search(r"has the shape \[8, .*config\.json describes \[6, ", message)


def test_aliases_of_the_count_that_disagree_are_refused(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    change_config(source, n_routed_experts=6)
    message = refuse(source, SourceError, options(source, 4)).message
    assert "config.json says n_routed_experts = 6, but the model is built with 8 experts" in message


@pytest.mark.parametrize(
    "change",
    [
        {"num_local_experts": "8"},
        {"hidden_size": None},
        {"hidden_act": "a_made_up_name"},
        {"dtype": "a_made_up_name"},
        {"rope_parameters": {"rope_type": "a_made_up_name"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_config_that_transformers_cannot_build_is_a_known_failure(tmp_path: Path, change: dict[str, Any]) -> None:
    source = build(tmp_path / "model")
    change_config(source, **change)
    error = refuse(source, SourceError, options(source, 4))
    assert "config.json" in error.message


def test_an_absurd_count_is_refused_before_a_model_of_that_size_is_built(tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    change_config(source, num_local_experts=10**9)
    assert "num_local_experts = 1000000000" in refuse(source, SourceError, options(source, 4)).message
    change_config(source, num_local_experts=9999)
    assert "9999 experts" in refuse(source, SourceError, options(source, 4)).message
