"""Fitted down projections make merged experts add up to a given output, as far as their neurons can."""

from dataclasses import replace

import pytest
import torch
from architectures import EXPERTS
from tiny_experts import rows_of, sample_of, tiny_experts, view_of
from torch import Tensor

from hcsmoe_hub.methods.refit import down_projections as least_squares
from hcsmoe_hub.methods.refit.down_projections import fit_down, routed_output
from hcsmoe_hub.observation.sample import NeuronSample

LAYOUTS = ("mixtral", "aria_text", "gpt_oss", "nemotron_h", "dbrx")
TOKENS = 1500


def layer(model_type: str) -> tuple[NeuronSample, Tensor]:
    """Tokens with their routing, and the down projections ``[E, I, H]`` of a layer's experts."""
    module = tiny_experts(model_type)
    return sample_of(module, TOKENS), view_of(module)(rows_of(module)).outputs[0].float()


def target(down: Tensor, seed: int) -> Tensor:
    """Any output ``[T, H]`` that the experts should add up to."""
    return torch.randn(TOKENS, down.shape[2], generator=torch.Generator().manual_seed(seed))


def random_like(tensor: Tensor, seed: int) -> Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)) * tensor.std()


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_projections_that_explain_the_output_are_found(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "RIDGE", 1e-9)
    sample, down = layer(model_type)
    wanted = down + random_like(down, 1)
    output = routed_output(sample, wanted)
    left = output - routed_output(sample, fit_down(sample, output, down, rounds=200))
    assert left.norm() < 1e-2 * routed_output(sample, wanted - down).norm()


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_the_error_on_the_fitted_tokens_falls(model_type: str) -> None:
    sample, down = layer(model_type)
    wanted = target(down, 2)
    errors = [(wanted - routed_output(sample, fitted)).norm() for fitted in (down, fit_down(sample, wanted, down))]
    assert errors[1] < errors[0]


def test_one_expert_alone_is_the_textbook_ridge_solution() -> None:
    sample, down = layer("mixtral")
    alone = NeuronSample(
        experts=sample.experts,
        tokens_TH=sample.tokens_TH,
        index_TK=torch.where(sample.index_TK == 2, 2, -1),
        weight_TK=sample.weight_TK,
    )
    wanted = target(down, 3)
    residual = wanted - routed_output(alone, down)
    token, slot = torch.where(alone.index_TK == 2)
    features = (alone.hidden(2, alone.tokens_TH[token]) * alone.weight_TK[token, slot, None]).double()
    gram = features.T @ features
    ridge = least_squares.RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    step = torch.linalg.solve(gram + ridge, features.T @ residual[token].double())
    fitted = fit_down(alone, wanted, down)
    assert torch.allclose(fitted[2], down[2] + step.float(), atol=1e-5)
    others = [expert for expert in range(EXPERTS) if expert != 2]
    assert torch.equal(fitted[others], down[others])


def test_nothing_changes_where_nothing_is_left_to_explain() -> None:
    sample, down = layer("mixtral")
    assert torch.allclose(fit_down(sample, routed_output(sample, down), down), down, atol=1e-6)


def test_what_is_given_is_not_changed() -> None:
    sample, down = layer("mixtral")
    wanted = target(down, 4)
    given = wanted.clone(), down.clone()
    fit_down(sample, wanted, down)
    assert torch.equal(wanted, given[0])
    assert torch.equal(down, given[1])


@pytest.mark.parametrize(("name", "limit"), [("KEPT_BYTES", 0), ("KEPT_BYTES", 50_000), ("CHUNK_TOKENS", 100)])
def test_memory_limits_do_not_change_the_result(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, down = layer("mixtral")
    wanted = target(down, 5)
    expected = fit_down(sample, wanted, down)
    monkeypatch.setattr(least_squares, name, limit)
    assert torch.allclose(fit_down(sample, wanted, down), expected, atol=1e-5)


@pytest.mark.parametrize("is_kept", [True, False])
def test_hidden_activations_are_computed_once_where_they_fit_into_memory(
    is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, down = layer("mixtral")
    computed: list[int] = []

    class Counted(NeuronSample):
        def hidden(self, expert: int, inputs_RH: Tensor) -> Tensor:
            computed.append(expert)
            return super().hidden(expert, inputs_RH)

    counted = Counted(
        experts=sample.experts, tokens_TH=sample.tokens_TH, index_TK=sample.index_TK, weight_TK=sample.weight_TK
    )
    monkeypatch.setattr(least_squares, "KEPT_BYTES", 1 << 30 if is_kept else 0)
    fit_down(counted, target(down, 6), down)
    assert (sorted(computed) == list(range(EXPERTS))) is is_kept


def test_less_is_kept_and_fewer_tokens_are_taken_where_memory_runs_out() -> None:
    sample, down = layer("mixtral")
    taken: list[int] = []

    class Scarce(NeuronSample):
        def hidden(self, expert: int, inputs_RH: Tensor) -> Tensor:
            if len(inputs_RH) > 100:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            taken.append(len(inputs_RH))
            return super().hidden(expert, inputs_RH)

    scarce = Scarce(
        experts=sample.experts, tokens_TH=sample.tokens_TH, index_TK=sample.index_TK, weight_TK=sample.weight_TK
    )
    expected = fit_down(sample, target(down, 5), down)
    assert torch.allclose(fit_down(scarce, target(down, 5), down), expected, atol=1e-5)
    assert max(taken) == 64
    with pytest.raises(torch.OutOfMemoryError):
        fit_down(_without_memory(sample), target(down, 5), down)


def _without_memory(sample: NeuronSample) -> NeuronSample:
    class Full(NeuronSample):
        def hidden(self, expert: int, inputs_RH: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return Full(
        experts=sample.experts, tokens_TH=sample.tokens_TH, index_TK=sample.index_TK, weight_TK=sample.weight_TK
    )


def test_choices_of_one_token_that_lead_to_one_expert_add_up() -> None:
    sample, down = layer("mixtral")
    twice = replace(sample, index_TK=sample.index_TK[:, :1].expand(-1, 2))
    once = replace(sample, index_TK=sample.index_TK[:, :1], weight_TK=sample.weight_TK.sum(1, keepdim=True))
    assert torch.equal(routed_output(twice, down), routed_output(once, down))
    assert torch.equal(fit_down(twice, target(down, 7), down), fit_down(once, target(down, 7), down))


def test_the_routed_output_is_what_the_experts_add_up_to() -> None:
    sample, down = layer("mixtral")
    expected = torch.zeros(TOKENS, down.shape[2])
    for token in range(TOKENS):
        for expert, weight in zip(sample.index_TK[token].tolist(), sample.weight_TK[token].tolist(), strict=True):
            if expert >= 0:
                output = sample.experts.project(expert, sample.experts.hidden(expert, sample.tokens_TH[token, None]))
                expected[token] += weight * output[0].detach()
    assert torch.allclose(routed_output(sample, down), expected, atol=1e-5)
