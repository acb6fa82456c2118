"""Steps for the matrices in front of the gate: an expert's linearisation, and what becomes of the exact output.

E experts, R tokens of one expert, P pre-activations, I neurons, H hidden size.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny_experts import rows_of, sample_of, tiny_experts, view_of
from torch import Tensor

from hcsmoe_hub.methods.refit import input_matrices as gauss_newton
from hcsmoe_hub.methods.refit.input_matrices import Linearised, fit_inputs
from hcsmoe_hub.model.expert_kinds import experts_of

# Gated, transposed, interleaved with biases and a clamp, without a gate, and two matrices of their own.
LAYOUTS = ("mixtral", "aria_text", "gpt_oss", "nemotron_h", "dbrx")
TOKENS, HIDDEN = 120, 32


def expert_of(model_type: str, *, dtype: torch.dtype = torch.float32) -> Linearised:
    """The first expert of a layer on all tokens, with a router weight each."""
    module = tiny_experts(model_type).to(dtype)
    experts, sample = experts_of(module), sample_of(module, TOKENS)
    tokens_RH = sample.tokens_TH.to(dtype)
    with torch.no_grad():
        return Linearised(
            inputs_RH=tokens_RH,
            pre_RP=experts.pre_activation(0, tokens_RH),
            weight_R1=sample.weight_TK[:, :1].to(dtype),
            down_IH=view_of(module)(rows_of(module)).outputs[0][0],
            gate=experts.gate,
        )


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_step(expert: Linearised, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """A step ``[P, H]`` in any direction."""
    return random(*expert.pull(torch.zeros(TOKENS, HIDDEN, dtype=dtype)).shape, dtype=dtype)


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_the_linearised_change_is_that_of_a_small_step(model_type: str) -> None:
    expert = expert_of(model_type, dtype=torch.float64)
    step = 1e-6 * random_step(expert, dtype=torch.float64)
    # Central differences, so that what is left is of the third order.
    exact = (expert.change(step) - expert.change(-step)) / 2
    assert exact.norm() > 0
    assert (expert.push(step) - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_pulling_is_the_transpose_of_pushing(model_type: str) -> None:
    expert = expert_of(model_type, dtype=torch.float64)
    step, output = random_step(expert, dtype=torch.float64), random(TOKENS, HIDDEN, seed=2, dtype=torch.float64)
    torch.testing.assert_close((expert.push(step) * output).sum(), (step * expert.pull(output)).sum())


def test_no_step_changes_nothing() -> None:
    expert = expert_of("mixtral")
    nothing = torch.zeros_like(random_step(expert))
    assert torch.equal(expert.change(nothing), torch.zeros(TOKENS, HIDDEN))
    assert torch.equal(expert.push(nothing), torch.zeros(TOKENS, HIDDEN))


def activated(gate: Callable[[Tensor], Tensor], *, tokens: int, neurons: int) -> Linearised:
    """An expert without a gate whose inputs have nothing to do with its derivatives, and differ in size."""
    inputs_RH = random(tokens, 6, seed=3) * torch.tensor([0.5, 1, 1, 2, 1, 4.0])
    return Linearised(
        inputs_RH=inputs_RH,
        pre_RP=random(tokens, neurons, seed=4),
        weight_R1=random(tokens, 1, seed=5).abs(),
        down_IH=random(neurons, 6, seed=6) * torch.arange(1.0, neurons + 1)[:, None],
        gate=gate,
    )


def test_the_curvature_is_the_exact_diagonal_but_for_what_keeps_rare_neurons_calm() -> None:
    expert = activated(F.silu, tokens=4000, neurons=5)
    curvature = expert.curvature()
    exact = torch.empty_like(curvature)
    for neuron, feature in torch.cartesian_prod(torch.arange(5), torch.arange(6)).tolist():
        unit = torch.zeros_like(curvature)
        unit[neuron, feature] = 1
        exact[neuron, feature] = expert.push(unit).square().sum()
    # Each factor is raised by its own mean.
    rows, columns = exact.sum(1) / exact.mean() / 6, exact.sum(0) / exact.mean() / 5
    expected = exact.mean() * (rows + 1)[:, None] * (columns + 1)
    assert (curvature / expected).log().abs().max() < 0.25


def test_a_neuron_that_never_fires_is_left_alone() -> None:
    def gate(pre_RP: Tensor) -> Tensor:
        return F.silu(pre_RP) * torch.tensor([1.0, 0, 1])

    expert = activated(gate, tokens=200, neurons=3)
    found = fit_inputs(expert, random(200, 6))
    assert found is not None
    step, _ = found
    assert step.isfinite().all()
    assert torch.equal(step[1], torch.zeros(6))
    assert step[0].norm() > 0


@pytest.mark.parametrize("size", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("model_type", LAYOUTS)
def test_a_step_always_brings_the_exact_output_nearer(model_type: str, size: float) -> None:
    expert = expert_of(model_type)
    lacking = size * random(TOKENS, HIDDEN)
    found = fit_inputs(expert, lacking)
    assert found is not None
    step, left = found
    torch.testing.assert_close(left, lacking - expert.change(step))
    assert left.norm() < lacking.norm()


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_what_a_small_step_has_changed_is_found_again(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauss_newton, "ITERATIONS", 100)
    expert = expert_of(model_type, dtype=torch.float64)
    lacking = expert.change(1e-3 * random_step(expert, dtype=torch.float64))
    found = fit_inputs(expert, lacking)
    assert found is not None
    assert found[1].norm() < 0.05 * lacking.norm()


def test_there_is_no_step_where_nothing_is_lacking() -> None:
    assert fit_inputs(expert_of("mixtral"), torch.zeros(TOKENS, HIDDEN)) is None


def test_there_is_no_step_where_the_expert_cannot_help() -> None:
    silent = activated(partial(torch.mul, other=0.0), tokens=50, neurons=3)
    assert fit_inputs(silent, random(50, 6)) is None


def curve(steepness: float) -> Linearised:
    """One neuron on one token: x -> x + steepness * x^2, of which the linearisation at 0 sees the first part only."""
    return Linearised(
        inputs_RH=torch.ones(1, 1),
        pre_RP=torch.zeros(1, 1),
        weight_R1=torch.ones(1, 1),
        down_IH=torch.ones(1, 1),
        gate=lambda pre_RP: pre_RP + steepness * pre_RP.square(),
    )


def test_a_step_that_overshoots_is_shortened() -> None:
    found = fit_inputs(curve(2), torch.ones(1, 1))
    assert found is not None
    step, left = found
    # The whole step would give 1 + 2, half of it 0.5 + 0.5.
    assert (step.item(), left.item()) == (0.5, 0)


def test_there_is_no_step_where_no_length_helps() -> None:
    assert fit_inputs(curve(1000), torch.ones(1, 1)) is None
