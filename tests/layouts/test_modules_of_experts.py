"""Modelling files on experts that transformers keeps module by module: Switch Transformers and NLLB-MoE."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from encoder_decoders import BUILDERS, EXPERTS, MOE_LAYERS, logits, nllb_model, pairs, stored_experts, switch_model
from torch import Tensor

from hcsmoe_hub.checkpoint.modeling_hcsmoe import expert_modules, tie_experts
from hcsmoe_hub.checkpoint.modeling_hcsmoe_factored import (
    INCOMING,
    ONE_BY_ONE,
    OUTGOING,
    FactorSizes,
    experts_modules,
    factor_experts,
    product,
)

EVERY_ROW = {layer: range(EXPERTS) for layer in MOE_LAYERS}
ROW_MAPS = {1: [0, 1, 2, 3, 0, 1, 2, 3], 3: [0, 1, 1, 2, 2, 0, 1, 2], 5: [0, 0, 1, 0, 1, 1, 0, 1]}
SIZES = FactorSizes(rank=3, incoming_rows=4, outgoing_rows=5)
every_kind = pytest.mark.parametrize("model_type", BUILDERS)


def with_copies(model: Any) -> Any:
    """The same with every expert replaced by the first one of its cluster."""
    full = copy.deepcopy(model)
    for layer, experts in stored_experts(full).items():
        row_map = ROW_MAPS[layer]
        for row in range(EXPERTS):
            first = experts[f"expert_{row_map.index(row_map[row])}"]
            experts[f"expert_{row}"].load_state_dict(first.state_dict())
    return full


def tied(model: Any) -> Any:
    """The same with the first expert of every cluster alone, and a map."""
    result = with_copies(model)
    for layer, experts in stored_experts(result).items():
        row_map = ROW_MAPS[layer]
        firsts = [copy.deepcopy(experts[f"expert_{row_map.index(expert)}"]) for expert in range(max(row_map) + 1)]
        for expert, first in enumerate(firsts):
            experts[f"expert_{expert}"] = first
    tie_experts(result, ROW_MAPS)
    return result


# What the modules compute


@every_kind
def test_layers_are_numbered_through_both_stacks(model_type: str) -> None:
    model = BUILDERS[model_type]()
    found = expert_modules(model)
    assert {layer: id(experts) for layer, experts in found.items()} == {
        layer: id(experts) for layer, experts in stored_experts(model).items()
    }
    assert tuple(found) == MOE_LAYERS


@every_kind
def test_rows_that_share_an_expert_compute_what_copies_of_it_do(model_type: str) -> None:
    model = BUILDERS[model_type]()
    full, shared = with_copies(model), tied(model)
    # transformers itself may run the wrong experts of NLLB-MoE.
    tie_experts(full, EVERY_ROW)
    assert torch.allclose(logits(shared), logits(full), atol=5e-6)
    assert not torch.allclose(logits(shared), logits(model), atol=1e-2)


def test_a_map_of_every_row_changes_no_bit_of_a_switch_transformers_model() -> None:
    model = switch_model()
    mapped = copy.deepcopy(model)
    tie_experts(mapped, EVERY_ROW)
    torch.testing.assert_close(logits(mapped), logits(model), rtol=0, atol=1e-6)


def test_nllb_runs_the_experts_that_its_router_weighs() -> None:
    """As transformers 4 and fairseq do: the sum of all experts by their weights, less what dropout would take."""
    model = nllb_model()
    tie_experts(model, EVERY_ROW)
    block = model.get_encoder().layers[1].ffn
    tokens_TH = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, weight_TN, _ = block.router(tokens_TH)
        outputs = torch.stack([block.experts[f"expert_{row}"](tokens_TH) for row in range(EXPERTS)], dim=1)
        expected_TH = (weight_TN[..., None] * outputs).sum(dim=1) * (1 - block.experts.moe_token_dropout)
        found_TH = block(tokens_TH[None])[0]
    assert (weight_TN > 0).sum(dim=1).eq(2).all()
    torch.testing.assert_close(found_TH, expected_TH, rtol=0, atol=1e-5)


def test_a_token_whose_two_rows_share_an_expert_gets_both_weights() -> None:
    model = nllb_model()
    tie_experts(model, dict.fromkeys(MOE_LAYERS, [0] * EXPERTS))
    experts = expert_modules(model)[1]
    tokens_TH, weight_TN = torch.randn(5, 32), torch.zeros(5, EXPERTS)
    weight_TN[:, 2], weight_TN[:, 6] = 0.75, 0.25
    with torch.no_grad():
        expected_TH = experts["expert_0"](tokens_TH) * (1 - experts.moe_token_dropout)
        found_TH = experts(tokens_TH, weight_TN.argmax(-1), weight_TN)
    torch.testing.assert_close(found_TH, expected_TH, rtol=0, atol=1e-6)


def test_a_row_has_room_for_as_many_tokens_as_before() -> None:
    model = switch_model(expert_capacity=2)
    row_map = [0] * EXPERTS
    tie_experts(model, dict.fromkeys(MOE_LAYERS, row_map))
    block = expert_modules(model)[1]
    router = model.get_encoder().block[1].layer[1].mlp.router
    tokens_BSH = torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mask_BSN, _, _ = router(tokens_BSH)
        outputs = model.get_encoder().block[1].layer[1].mlp(tokens_BSH)
    # Two for each of eight rows, although one expert runs them all.
    assert int(mask_BSN.sum()) == int(outputs.abs().sum(-1).count_nonzero()) > 2
    assert block.num_experts == 1


@every_kind
def test_another_shape_of_choices_is_refused(model_type: str) -> None:
    for change in (lambda model: tie_experts(model, ROW_MAPS), lambda model: factor_experts(model, SIZES)):
        model = BUILDERS[model_type]()
        change(model)
        experts = stored_experts(model)[1]
        with pytest.raises(ValueError, match="this version of transformers is not supported"):
            experts(torch.randn(3, 32), torch.tensor([[0, 1]] * 3), torch.full((3, 2), 0.5))


@every_kind
def test_factored_experts_compute_what_experts_with_their_matrices_do(model_type: str) -> None:
    whole = BUILDERS[model_type]()
    factored = copy.deepcopy(whole)
    factor_experts(factored, SIZES)
    for name, experts in experts_modules(factored).items():
        original: Any = whole.get_submodule(name)
        for expert in range(EXPERTS):
            for place, linear in zip((INCOMING, OUTGOING), ONE_BY_ONE[type(experts).__name__], strict=True):
                inputs = getattr(experts, f"{place}_v").shape[-1]
                matrix = product(experts, place, expert, 0, torch.eye(inputs)).T
                getattr(original[f"expert_{expert}"], linear).weight.data.copy_(matrix)
    tie_experts(whole, EVERY_ROW)
    assert torch.allclose(logits(factored), logits(whole), atol=1e-5)


@every_kind
def test_factors_take_the_place_of_matrices_and_biases_stay(model_type: str) -> None:
    model = BUILDERS[model_type]()
    before = {name for name in model.state_dict() if ".experts." in name}
    factor_experts(model, SIZES)
    after = {name for name in model.state_dict() if ".experts." in name}
    assert before & after == {name for name in before if name.endswith(".bias")}
    assert {name.rpartition(".")[2] for name in after - before} == {
        f"{place}_{part}" for place in (INCOMING, OUTGOING) for part in ("u", "v", "s", "rows")
    }


# A model's life


def deep_copied(model: Any) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@every_kind
@pytest.mark.parametrize("change", [deep_copied, pickled])
def test_copies_compute_the_same_with_weights_of_their_own(model_type: str, change: Callable[[Any], Any]) -> None:
    for prepare in (tied, lambda model: factor_experts(model, SIZES) or model):
        model: Any = prepare(BUILDERS[model_type]())
        copied = change(model)
        torch.testing.assert_close(logits(copied), logits(model), rtol=0, atol=1e-6)
        with torch.no_grad():
            for experts in stored_experts(copied).values():
                for parameter in experts.parameters():
                    parameter.zero_()
        assert not torch.allclose(logits(copied), logits(model), atol=1e-3)


@every_kind
def test_gradients_reach_experts_and_router(model_type: str) -> None:
    for prepare in (tied, lambda model: factor_experts(model, SIZES) or model):
        model: Any = prepare(BUILDERS[model_type]())
        source, target = pairs()
        model.train()(input_ids=source, labels=target).loss.backward()
        grown = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert any(".experts." in name for name in grown)
        assert any(".router." in name for name in grown)
        assert all(_is_finite(parameter.grad) for parameter in model.parameters() if parameter.grad is not None)


def _is_finite(gradient: Tensor) -> bool:
    return bool(gradient.isfinite().all())
