"""Switch Transformers and NLLB-MoE: both stacks run layer by layer as the model itself runs them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_decoders import BUILDERS, MOE_LAYERS, SOURCE, TARGET, VOCABULARY, logits, nllb_model, pairs, switch_model
from tiny_models import options, read_config, refuse
from torch import Tensor
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from hcsmoe_hub import convert, plan
from hcsmoe_hub.errors import CalibrationError, PlanError, UnsupportedModelError
from hcsmoe_hub.events import ignore
from hcsmoe_hub.model.head import head
from hcsmoe_hub.model.sequences import predicted_tokens
from hcsmoe_hub.model.stacked_experts import SwitchBlock
from hcsmoe_hub.model.wrong_experts import run_chosen_experts
from hcsmoe_hub.options import CalibrationOptions, ConvertOptions, MethodOptions, Preset, Refit
from hcsmoe_hub.pipeline.reading import open_loader, open_reader
from hcsmoe_hub.pipeline.stream import make_batcher, stream

IDS = torch.cat(pairs(), dim=1)


def saved(name: str, folder: Path, **changes: Any) -> Path:
    BUILDERS[name](**changes).save_pretrained(folder, max_shard_size="60KB")
    return folder


def wanted(source: Path, **others: Any) -> ConvertOptions:
    """Options of a conversion on pairs that split where the tests' models were given them."""
    found = options(source, others.pop("experts", 4), ids=IDS, device="cpu", **others)
    return replace(found, calibration=replace(found.calibration, source_length=SOURCE))


def streamed_logits(source: Path) -> Tensor:
    """Logits of the targets, from a pass with one layer in memory at a time and two sequences per micro-batch."""
    found = plan(source, wanted(source))
    skeleton = found.model.skeleton
    batcher = make_batcher(skeleton, IDS, batch_tokens=2 * IDS.shape[1], device=torch.device("cpu"))
    with (
        open_reader(found, found.observing_order, ignore) as reader,
        open_loader(found, reader, batcher) as loader,
        torch.no_grad(),
    ):
        loader.load(None)
        hidden_BTH = stream(
            skeleton, loader, lambda layer, inputs: layer.run(inputs), IDS, batcher=batcher, source_length=SOURCE
        )
        return torch.stack([head(skeleton, hidden_TH) for hidden_TH in hidden_BTH])


@pytest.mark.parametrize("name", BUILDERS)
def test_both_stacks_run_layer_by_layer_as_in_the_whole_model(name: str, tmp_path: Path) -> None:
    model = BUILDERS[name]()
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    run_chosen_experts(model)
    found = streamed_logits(tmp_path / "model")
    assert found.shape == (len(IDS), TARGET, VOCABULARY)
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_layers_are_numbered_through_both_stacks(name: str, tmp_path: Path) -> None:
    source = saved(name, tmp_path / "model")
    skeleton = plan(source, wanted(source)).model.skeleton
    assert (skeleton.is_encoder_decoder, skeleton.encoder_depth, skeleton.depth) == (True, 4, 6)
    paths = [skeleton.layer_path(number) for number in range(6)]
    assert ["encoder" in path for path in paths] == [True] * 4 + [False] * 2
    assert [skeleton.layer_of(f"{path}.any") for path in paths] == list(range(6))
    assert [layer.layer for layer in convert(source, wanted(source)).layers] == list(MOE_LAYERS)


def test_fewer_experts_have_room_for_more_tokens_each(tmp_path: Path) -> None:
    source = saved("switch_transformers", tmp_path / "model", expert_capacity=3)
    convert(source, wanted(source, experts=5))
    before, after = read_config(source), read_config(tmp_path / "result")
    assert after == before | {"num_experts": 5, "expert_capacity": 5}


def test_dropped_tokens_visit_no_expert(tmp_path: Path) -> None:
    source = saved("switch_transformers", tmp_path / "model", expert_capacity=1)
    report = convert(source, wanted(source, method=MethodOptions(preset=Preset.REAP)))
    for layer in report.layers:
        length = SOURCE if layer.layer < 4 else TARGET
        assert max(layer.usage) <= len(IDS)
        assert sum(layer.usage) < len(IDS) * length


def switch_block(capacity: int) -> tuple[SwitchTransformersSparseMLP, SwitchBlock]:
    """A block of transformers, and the same with fused experts."""
    config = SwitchTransformersConfig(d_model=8, d_ff=6, num_experts=3, expert_capacity=capacity)
    torch.manual_seed(0)
    plain = SwitchTransformersSparseMLP(config).eval().requires_grad_(False)
    fused = SwitchBlock(SwitchTransformersSparseMLP(config).eval())
    fused.router.classifier.weight.data.copy_(plain.router.classifier.weight)
    for expert in range(3):
        fused.experts.up_proj.data[expert].copy_(plain.experts[f"expert_{expert}"].wi.weight)
        fused.experts.down_proj.data[expert].copy_(plain.experts[f"expert_{expert}"].wo.weight)
    return plain, fused


@pytest.mark.parametrize("capacity", [1, 3, 64])
def test_experts_have_room_for_the_first_tokens_of_each_sequence(capacity: int) -> None:
    plain, fused = switch_block(capacity)
    hidden_BSH = torch.randn(4, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(fused(hidden_BSH), plain(hidden_BSH))


def test_sequences_that_lie_behind_each_other_still_have_room_of_their_own() -> None:
    _, fused = switch_block(2)
    hidden_BSH = torch.randn(4, 9, 8)
    position_BS = torch.arange(9, dtype=torch.int32).expand(4, 9)
    with torch.no_grad():
        expected = fused(hidden_BSH).flatten(0, 1)
        found = fused(hidden_BSH.view(1, -1, 8), position_BS.reshape(1, -1))[0]
    torch.testing.assert_close(found, expected)
    assert (expected == 0).all(-1).any()


def test_a_second_expert_that_is_drawn_at_random_is_refused(tmp_path: Path) -> None:
    nllb_model(second_expert_policy="random").save_pretrained(tmp_path / "model")
    error = refuse(tmp_path / "model", UnsupportedModelError, wanted(tmp_path / "model"))
    assert "second_expert_policy = 'random'" in error.message


def test_a_router_that_always_chooses_one_expert_takes_no_other_number(tmp_path: Path) -> None:
    source = saved("switch_transformers", tmp_path / "model")
    error = refuse(source, PlanError, wanted(source, experts_per_token=2))
    assert "routers of switch_transformers always choose 1 expert, and no key of the config says so" in error.message


def test_a_training_of_the_whole_model_is_refused(tmp_path: Path) -> None:
    switch_model().save_pretrained(tmp_path / "model")
    method = MethodOptions(preset=Preset.HC_SMOE, refit=Refit.MODEL)
    error = refuse(tmp_path / "model", PlanError, wanted(tmp_path / "model", method=method))
    assert "reads one text with its encoder and writes another" in error.message


def test_half_of_each_sequence_of_token_ids_goes_into_the_encoder(tmp_path: Path) -> None:
    source = saved("nllb-moe", tmp_path / "model")
    assert plan(source, options(source, 4, ids=IDS)).calibration.source_length == IDS.shape[1] // 2
    assert plan(source, wanted(source)).calibration.source_length == SOURCE


@pytest.mark.parametrize("length", [IDS.shape[1], IDS.shape[1] + 1])
def test_an_encoder_leaves_the_decoder_at_least_one_token(length: int, tmp_path: Path) -> None:
    source = saved("nllb-moe", tmp_path / "model")
    np.save(tmp_path / "ids.npy", IDS.numpy())
    calibration = CalibrationOptions(dataset=str(tmp_path / "ids.npy"), source_length=length)
    with pytest.raises((PlanError, CalibrationError), match=str(length)):
        plan(source, ConvertOptions(experts=4, output=tmp_path / "result", calibration=calibration))


def test_a_decoder_behind_an_encoder_predicts_its_labels_and_a_decoder_alone_the_next_token() -> None:
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(predicted_tokens(ids, 4), ids[:, 4:])
    assert torch.equal(predicted_tokens(ids), ids[:, 1:])
