"""The probe computes what transformers computes, and its statistics are those of every expert on every token.

E experts, T tokens, H hidden size, K experts per token.
"""

from collections.abc import Iterator

import pytest
import torch
from observed_blocks import (
    ARCHITECTURES,
    BATCHES,
    Case,
    E,
    H,
    Seen,
    eager,
    is_llama4,
    probe,
    randomise,
    relative,
    tiny_case,
    zaya,
)

from hcsmoe_hub.model.expert_kinds import experts_of, is_experts_module, use_probe
from hcsmoe_hub.observation.calibration_observer import CalibrationObserver, mean_outputs
from hcsmoe_hub.observation.statistics import ExpertStatistics

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=ARCHITECTURES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    with torch.no_grad():
        yield tiny_case(request.param)


def test_the_block_computes_under_observation_what_transformers_computes(case: Case) -> None:
    expected = eager(case).block_TH
    observer, outputs = probe(case)
    assert [len(output) for output in outputs] == [7, 99, 130]
    assert relative(torch.cat(outputs), expected) < 1e-5
    assert len(observer.outputs) == len(observer.top_k) == len(BATCHES)


def test_the_remembered_outputs_are_the_weighted_sums_of_the_chosen_experts(case: Case) -> None:
    seen = eager(case)
    observer, _ = probe(case)
    outputs = seen.outputs_ETH
    if is_llama4(case):
        # Its router scales what goes into an expert, not what comes out.
        scaled = torch.stack([seen.tokens_TH * weight_T[:, None] for weight_T in seen.weight_TK.T])
        chosen = [case.experts(tokens_TH.repeat(E, 1)).view(E, *tokens_TH.shape) for tokens_TH in scaled]
        expected = sum(
            output_ETH[index_T, torch.arange(len(index_T))]
            for output_ETH, index_T in zip(chosen, seen.index_TK.T, strict=True)
        )
    else:
        picked_TKH = outputs[seen.index_TK, torch.arange(len(seen.index_TK))[:, None]]
        expected = (picked_TKH * seen.weight_TK[..., None]).sum(1)
    assert relative(torch.cat(observer.outputs), expected) < 1e-5


def test_experts_that_are_stored_narrower_compute_in_the_dtype_of_the_tokens(case: Case) -> None:
    # A norm behind the experts belongs to none of them.
    stored = [values for name, values in case.experts.named_parameters() if "norm" not in name]
    for values in stored:
        values.data = values.data.bfloat16().float()
    wide, wide_outputs = probe(case)
    for values in stored:
        values.data = values.data.bfloat16()
    narrow, outputs = probe(case)
    assert all(torch.equal(one, other) for one, other in zip(outputs, wide_outputs, strict=True))
    means = [mean_outputs(experts_of(case.experts), observer.statistics) for observer in (narrow, wide)]
    assert torch.equal(*means)


def test_mean_outputs_are_the_means_of_every_expert_over_all_tokens(case: Case) -> None:
    seen = eager(case)
    observer, _ = probe(case)
    means = mean_outputs(experts_of(case.experts), observer.statistics)
    assert means.dtype == torch.float32
    assert means.shape == (E, seen.tokens_TH.shape[1])
    expected = seen.outputs_ETH.double().mean(1)
    for mean, exact in zip(means, expected, strict=True):
        assert relative(mean, exact) < 1e-5


def test_usage_is_how_often_the_router_chose_an_expert(case: Case) -> None:
    seen = eager(case)
    observer, _ = probe(case)
    chosen = seen.index_TK[seen.weight_TK != 0]
    assert torch.equal(observer.statistics.usage_E, torch.bincount(chosen, minlength=E))
    assert observer.statistics.tokens == len(seen.tokens_TH)
    assert len(set(observer.statistics.usage_E.tolist())) > 1


def test_the_remembered_choice_is_the_choice_of_the_router(case: Case) -> None:
    seen = eager(case)
    observer, _ = probe(case)
    remembered = torch.cat(observer.top_k)
    assert remembered.dtype == torch.int16
    assert torch.equal(remembered.long(), torch.where(seen.weight_TK != 0, seen.index_TK, -1))


def test_saliency_is_the_sum_of_weight_times_norm_over_the_routed_tokens(case: Case) -> None:
    seen = eager(case)
    observer, _ = probe(case)
    for expert, saliency in enumerate(observer.statistics.saliency_E.tolist()):
        token, slot = torch.where((seen.index_TK == expert) & (seen.weight_TK != 0))
        weight_N1 = seen.weight_TK[token, slot, None]
        if is_llama4(case):
            states = torch.zeros(E, len(token), H)
            states[expert] = seen.tokens_TH[token] * weight_N1
            routed_NH = case.experts(states.flatten(0, 1)).view_as(states)[expert]
        else:
            routed_NH = seen.outputs_ETH[expert, token] * weight_N1
        assert saliency == pytest.approx(float(routed_NH.norm(dim=-1).sum()), rel=1e-5)


def routed_alone(case: Case, seen: Seen) -> torch.Tensor:
    """What every choice adds to the routed output, ``[T, K, H]``; 0 for no choice."""
    token_T1 = torch.arange(len(seen.tokens_TH))[:, None]
    index_TK = seen.index_TK.clamp(max=E - 1)
    if not is_llama4(case):
        return seen.outputs_ETH[index_TK, token_T1] * seen.weight_TK[..., None] * (seen.index_TK < E)[..., None]
    inputs_TKH = seen.tokens_TH[:, None] * seen.weight_TK[..., None]
    every_ETKH = case.experts(inputs_TKH.flatten(0, 1).repeat(E, 1)).view(E, *inputs_TKH.shape)
    return every_ETKH[index_TK, token_T1, torch.arange(index_TK.shape[1])[None]]


def test_the_gram_matrix_holds_the_products_of_outputs_that_come_together(case: Case) -> None:
    seen = eager(case)
    observer, _ = probe(case, with_gram=True)
    routed_TKH = routed_alone(case, seen).double()
    # Every expert's share of every token, so that the products are those of whole matrices.
    share_ETH = torch.stack(
        [(routed_TKH * (seen.index_TK == expert)[..., None]).sum(1) for expert in range(E)]
    ).flatten(1)
    gram_EE = observer.statistics.gram_EE
    assert gram_EE.dtype == torch.float64
    assert relative(gram_EE, share_ETH @ share_ETH.T) < 1e-5
    assert float(gram_EE.sum()) == pytest.approx(float(torch.cat(observer.outputs).double().square().sum()), rel=1e-4)


def test_the_products_of_outputs_are_added_up_only_where_they_are_wanted(case: Case) -> None:
    assert not probe(case)[0].statistics.gram_EE.any()


def test_weights_and_norms_are_those_of_the_routed_tokens(case: Case) -> None:
    seen = eager(case)
    observer, _ = probe(case)
    routed_TKH = routed_alone(case, seen)
    for expert in range(E):
        chosen_TK = (seen.index_TK == expert) & (seen.weight_TK != 0)
        assert float(observer.statistics.mass_E[expert]) == pytest.approx(float(seen.weight_TK[chosen_TK].sum()))
        norm_N = routed_TKH[chosen_TK].norm(dim=-1)
        gate_N = 1 if is_llama4(case) else seen.weight_TK[chosen_TK]
        assert float(observer.statistics.norm_E[expert]) == pytest.approx(float((norm_N / gate_N).sum()), rel=1e-4)


def test_statistics_do_not_depend_on_the_micro_batches(case: Case) -> None:
    observer, _ = probe(case)
    case.batches = [torch.cat([states.flatten(0, -2) for states in case.batches])[None]]
    whole, _ = probe(case)
    assert torch.equal(whole.statistics.usage_E, observer.statistics.usage_E)
    assert relative(observer.statistics.mean_features(), whole.statistics.mean_features()) < 1e-6
    assert relative(observer.statistics.saliency_E, whole.statistics.saliency_E) < 1e-6


def test_half_precision_stays_close_to_transformers_in_half_precision(case: Case) -> None:
    case.model.bfloat16()
    case.batches = [states.bfloat16() for states in case.batches]
    seen = eager(case)
    observer, outputs = probe(case)
    assert outputs[0].dtype == torch.bfloat16
    assert relative(torch.cat(outputs), seen.block_TH) < 2e-2
    means = mean_outputs(experts_of(case.experts), observer.statistics)
    assert relative(means, seen.outputs_ETH.double().mean(1)) < 2e-2


def test_nothing_remains_when_the_observation_ends(case: Case) -> None:
    expected = eager(case).block_TH
    before = (set(vars(case.block)), set(vars(case.experts)))
    probe(case)
    assert (set(vars(case.block)), set(vars(case.experts))) == before
    case.use("eager")
    assert torch.equal(torch.cat(case.run()), expected)


def test_an_observation_ends_when_the_block_fails(case: Case) -> None:
    before = (set(vars(case.block)), set(vars(case.experts)))

    def failing(*inputs: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    use_probe(case.model)
    observing = experts_of(case.experts).observing(case.block, failing)
    with pytest.raises(RuntimeError, match="out of memory"), observing:
        case.run()
    assert (set(vars(case.block)), set(vars(case.experts))) == before


def test_a_class_that_is_no_expert_is_routed_nowhere() -> None:
    with torch.no_grad():
        model = zaya().float().eval()
        randomise(model)
        path = next(name for name, module in model.named_modules() if is_experts_module(module))
        block, experts = model.get_submodule(path.rpartition(".")[0]), model.get_submodule(path)
        # As probable as the experts: some tokens choose it, some do not.
        block.gate.balancing_biases.zero_()
        use_probe(model)
        observer = CalibrationObserver(ExpertStatistics.empty(E))
        experts_of(experts).observe(block, observer)
        states = torch.randn(1, 500, H, generator=torch.Generator().manual_seed(2))
        logits, _, _, _ = block.gate(states)
        chosen = logits.argmax(-1)
        block(states)
    skipped = int((chosen == E).sum())
    assert 0 < skipped < 500
    assert observer.statistics.usage_E.tolist() == torch.bincount(chosen.flatten(), minlength=E + 1)[:E].tolist()
    assert int((observer.top_k[0] == -1).sum()) == skipped


def test_only_modules_that_hold_routed_experts_can_be_observed(case: Case) -> None:
    found = [name for name, module in case.model.named_modules() if is_experts_module(module)]
    assert len(found) == 1
    assert experts_of(case.experts).num_experts == E
