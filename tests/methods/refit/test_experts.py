"""Whole experts fitted to a given output, by turns in front of the gate and behind it.

E experts, T tokens, I neurons, H hidden size.
"""

from dataclasses import replace

import pytest
import torch
from architectures import EXPERTS
from tiny_experts import rows_of, sample_of, tiny_experts, view_of
from torch import Tensor, nn

from hcsmoe_hub.methods.refit import experts as module_under_test
from hcsmoe_hub.methods.refit.down_projections import fit_down, routed_output
from hcsmoe_hub.methods.refit.experts import ROUNDS, fit_experts
from hcsmoe_hub.observation.sample import NeuronSample

LAYOUTS = ("mixtral", "aria_text", "gpt_oss", "nemotron_h", "dbrx")
TOKENS = 1000


def layer(model_type: str = "mixtral") -> tuple[nn.Module, NeuronSample, Tensor]:
    """A layer's experts, tokens with their routing, and a view ``[E, I, H]`` of the down projections."""
    module = tiny_experts(model_type).float()
    return module, sample_of(module, TOKENS), view_of(module)(rows_of(module)).outputs[0]


def perturbed(model_type: str = "mixtral") -> tuple[nn.Module, NeuronSample, Tensor, Tensor]:
    """The same with other input matrices, and the output that the layer had before."""
    module, sample, down = layer(model_type)
    wanted = routed_output(sample, down)
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for expert in range(EXPERTS):
            for matrix in sample.experts.inputs(expert):
                matrix += 0.3 * matrix.std() * torch.randn(matrix.shape, generator=numbers)
    return module, sample, down, wanted


def error(sample: NeuronSample, down: Tensor, wanted: Tensor) -> float:
    return float((wanted - routed_output(sample, down)).norm() / wanted.norm())


def fit(sample: NeuronSample, down: Tensor, wanted: Tensor, *, seed: int = 0) -> list[float]:
    """Errors before the first round and after each."""
    with torch.no_grad():
        return [
            error(sample, down, wanted),
            *(error(sample, down, wanted) for _ in fit_experts(sample, wanted, down, seed=seed)),
        ]


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_experts_whose_input_matrices_were_changed_are_found_again(model_type: str) -> None:
    _, sample, down, wanted = perturbed(model_type)
    behind_the_gate = error(sample, fit_down(sample, wanted, down), wanted)
    errors = fit(sample, down, wanted)
    assert len(errors) == ROUNDS + 1
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * behind_the_gate


def test_every_tensor_is_written_in_place_and_biases_stay() -> None:
    module, sample, down, wanted = perturbed("gpt_oss")
    before = {name: tensor.clone() for name, tensor in module.named_parameters()}
    fit(sample, down, wanted)
    after = dict(module.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"gate_up_proj", "down_proj"}


def test_rounds_are_done_one_by_one() -> None:
    module, sample, down, wanted = perturbed()
    rounds = fit_experts(sample, wanted, down, seed=0)
    start = {name: tensor.clone() for name, tensor in module.named_parameters()}
    assert all(torch.equal(start[name], tensor) for name, tensor in module.named_parameters())
    with torch.no_grad():
        assert next(rounds) == 1
        first = {name: tensor.clone() for name, tensor in module.named_parameters()}
        assert next(rounds) == 2
    assert not any(torch.equal(first[name], start[name]) for name in start)
    assert not any(torch.equal(first[name], tensor) for name, tensor in module.named_parameters())


@pytest.mark.parametrize(("seed", "is_same"), [(0, True), (1, False)])
def test_the_seed_alone_decides_which_tokens_are_looked_at(
    seed: int, is_same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_under_test, "STEP_TOKENS", 300)
    found = []
    for number in (0, seed):
        module, sample, down, wanted = perturbed()
        fit(sample, down, wanted, seed=number)
        found.append(torch.cat([tensor.flatten() for tensor in module.parameters()]))
    assert torch.equal(*found) is is_same


def test_experts_that_no_token_visits_stay_as_they_are() -> None:
    module, sample, down, wanted = perturbed()
    lonely = replace(sample, index_TK=torch.where(sample.index_TK == 2, -1, sample.index_TK))
    before = {name: tensor.clone() for name, tensor in module.named_parameters()}
    errors = fit(lonely, down, wanted)
    assert errors[-1] < errors[0]
    for name, tensor in module.named_parameters():
        same = [torch.equal(before[name][expert], tensor[expert]) for expert in range(EXPERTS)]
        assert same == [expert == 2 for expert in range(EXPERTS)]


def test_experts_that_add_up_already_stay_nearly_as_they_are() -> None:
    module, sample, down = layer()
    before = {name: tensor.clone() for name, tensor in module.named_parameters()}
    fit(sample, down, routed_output(sample, down))
    for name, tensor in module.named_parameters():
        torch.testing.assert_close(before[name], tensor, atol=1e-4, rtol=0)


def test_a_token_whose_choices_lead_to_one_expert_is_seen_once() -> None:
    module, sample, down, wanted = perturbed()
    first = replace(sample, index_TK=sample.index_TK[:, :1].expand(-1, 2))
    errors = fit(first, down, wanted)
    assert errors == sorted(errors, reverse=True)
    other, sample, down, wanted = perturbed()
    fit(replace(sample, index_TK=first.index_TK[:, :1], weight_TK=sample.weight_TK.sum(1, keepdim=True)), down, wanted)
    assert all(torch.equal(one, two) for one, two in zip(module.parameters(), other.parameters(), strict=True))
