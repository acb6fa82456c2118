"""Streaming statistics: sums by hand, and the same figures however the tokens were cut into micro-batches.

E experts, T tokens, F feature size, K experts per token.
"""

from math import exp

import pytest
import torch
from torch import Tensor

from hcsmoe_hub.observation.statistics import Call, ExpertStatistics, LayerStatistics, sample_tokens

E, T, F, K = 5, 600, 12, 2


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def collect(
    top_k_TK: Tensor, features_ETF: Tensor, routed_TKF: Tensor, logits_TE: Tensor, sizes: list[int]
) -> ExpertStatistics:
    """Statistics of the same tokens in micro-batches of the given sizes."""
    statistics = ExpertStatistics.empty(len(features_ETF))
    start = 0
    for size in sizes:
        tokens = slice(start, start + size)
        statistics.count(top_k_TK[tokens])
        statistics.add_logits(logits_TE[tokens])
        for expert, features_TF in enumerate(features_ETF):
            statistics.add_features(expert, features_TF[tokens])
            statistics.add_norms(expert, routed_TKF[tokens][top_k_TK[tokens] == expert].norm(dim=-1))
        start += size
    return statistics


def random_cut(seed: int) -> list[int]:
    """Sizes of random micro-batches that hold all tokens."""
    edges = torch.randperm(T - 1, generator=generator(seed))[:20].add(1).sort().values.tolist()
    return [end - start for start, end in zip([0, *edges], [*edges, T], strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_do_not_depend_on_the_micro_batches(dtype: torch.dtype) -> None:
    top_k = torch.randint(-1, E, (T, K), generator=generator(0), dtype=torch.int16)
    features = (torch.randn(E, T, F, generator=generator(1)) + 0.5).to(dtype)
    routed = torch.randn(T, K, F, generator=generator(2))
    logits = torch.randn(T, E, generator=generator(3)).to(dtype)
    whole = collect(top_k, features, routed, logits, [T])
    for seed in range(5):
        sizes = random_cut(seed)
        assert len(sizes) == 21
        cut = collect(top_k, features, routed, logits, sizes)
        assert cut.tokens == whole.tokens == T
        assert torch.equal(cut.usage_E, whole.usage_E)
        assert torch.allclose(cut.mean_features(), whole.mean_features(), rtol=1e-6, atol=1e-8)
        assert torch.allclose(cut.saliency_E, whole.saliency_E, rtol=1e-6, atol=0)
        assert torch.allclose(cut.probability_E, whole.probability_E, rtol=1e-9, atol=0)
        assert torch.allclose(cut.logits_gram_EE, whole.logits_gram_EE, rtol=1e-9, atol=1e-9)


def test_features_are_the_mean_over_all_tokens() -> None:
    statistics = ExpertStatistics.empty(2)
    for features in (torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([[5.0, -2.0]])):
        statistics.count(torch.zeros(len(features), 1, dtype=torch.int16))
        statistics.add_features(0, features)
        statistics.add_features(1, 10 * features)
    assert statistics.mean_features().tolist() == [[3, 2], [30, 20]]
    assert statistics.mean_features().dtype == torch.float64


def test_features_of_half_precision_are_summed_in_float32() -> None:
    # In bfloat16, 256 + 1 is 256.
    statistics = ExpertStatistics.empty(1)
    statistics.add_features(0, torch.ones(1000, 1, dtype=torch.bfloat16))
    assert statistics.features_EF.tolist() == [[1000]]


def test_micro_batches_are_accumulated_in_float64() -> None:
    # In float32, 2^24 + 1 is 2^24.
    statistics = ExpertStatistics.empty(1)
    for value in (2.0**24, *[1.0] * 100):
        statistics.add_features(0, torch.full((1, 1), value))
        statistics.add_norms(0, torch.full((1, 1), value).norm(dim=-1))
    assert statistics.features_EF.tolist() == [[2**24 + 100]]
    assert statistics.saliency_E.tolist() == [2**24 + 100]


def test_every_choice_of_the_router_counts_and_none_is_no_choice() -> None:
    statistics = ExpertStatistics.empty(4)
    statistics.count(torch.tensor([[0, 1], [1, -1], [-1, -1]], dtype=torch.int16))
    statistics.count(torch.tensor([[3, 1]], dtype=torch.int16))
    assert statistics.usage_E.tolist() == [1, 3, 0, 1]
    assert statistics.usage_E.dtype == torch.int64
    assert statistics.tokens == 4


def test_counts_go_beyond_what_the_choices_are_stored_in() -> None:
    statistics = ExpertStatistics.empty(1)
    for _ in range(5):
        statistics.count(torch.zeros(10_000, 1, dtype=torch.int16))
    assert statistics.usage_E.tolist() == [50_000]


def finish(sums: ExpertStatistics) -> LayerStatistics:
    """What is remembered of a layer, but for its outputs and its tokens."""
    return LayerStatistics.of(sums, outputs_EH=torch.zeros(len(sums.usage_E), 1), sample=None)


def test_saliency_is_the_mean_norm_of_the_weighted_outputs_over_the_tokens_routed_there() -> None:
    sums = ExpertStatistics.empty(2)
    # Expert 0 sees two tokens with router weights 0.5 and 0.25, expert 1 sees one with 0.5.
    sums.count(torch.tensor([[0, 1], [0, -1], [-1, -1]]))
    sums.add_norms(0, (torch.tensor([[3.0, 4.0]]) * 0.5).norm(dim=-1))
    sums.add_norms(0, (torch.tensor([[6.0, 8.0]]) * 0.25).norm(dim=-1))
    sums.add_norms(1, (torch.tensor([[0.0, 1.0]]) * 0.5).norm(dim=-1))
    assert finish(sums).saliency_E.tolist() == [(0.5 * 5 + 0.25 * 10) / 2, 0.5]


def test_an_expert_without_tokens_has_no_saliency() -> None:
    sums = ExpertStatistics.empty(3)
    sums.count(torch.tensor([[1]]))
    sums.add_norms(1, torch.tensor([[2.0]]).norm(dim=-1))
    assert finish(sums).saliency_E.tolist() == [0, 2, 0]


def test_the_routing_score_is_the_mean_probability_over_all_tokens() -> None:
    sums = ExpertStatistics.empty(2)
    for logits in ([[0.0, 0.0]], [[0.0, 3.0], [-2.0, 1.0]]):
        sums.count(torch.tensor([[1]] * len(logits)))
        sums.add_logits(torch.tensor(logits))
    probability = 1 / (1 + exp(3))
    score = finish(sums).routing_score_E
    assert score.dtype == torch.float64
    assert score.tolist() == pytest.approx([(0.5 + 2 * probability) / 3, (0.5 + 2 * (1 - probability)) / 3], rel=1e-12)


def test_logits_far_from_zero_have_finite_probabilities() -> None:
    sums = ExpertStatistics.empty(2)
    sums.add_logits(torch.tensor([[1e4, -1e4]], dtype=torch.bfloat16))
    assert sums.probability_E.tolist() == [1, 0]


def test_products_of_logits_are_summed_over_all_tokens() -> None:
    sums = ExpertStatistics.empty(2)
    sums.add_logits(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
    sums.add_logits(torch.tensor([[5.0, 0.0]]))
    assert sums.logits_gram_EE.tolist() == [[1 + 9 + 25, 2 - 12], [2 - 12, 4 + 16]]
    assert sums.logits_gram_EE.dtype == torch.float64


def test_empty_statistics_hold_nothing() -> None:
    sums = ExpertStatistics.empty(3)
    assert sums.tokens == 0
    for values in (sums.usage_E, sums.saliency_E, sums.probability_E, sums.logits_gram_EE):
        assert values.sum() == 0


# The sample of tokens


def call(number: int, sequences: int, length: int) -> Call:
    """Two inputs of a block: a number per token, and a vector with that number."""
    first = 100 * number
    numbers = torch.arange(first, first + sequences * length).view(sequences, length)
    return Call(args=(numbers,), kwargs={"states": numbers[..., None].expand(-1, -1, 3).float()})


def sampled(count: int, seed: int = 0) -> Call:
    """A sample of 6 + 20 tokens."""
    found = sample_tokens([call(0, 2, 3), call(1, 4, 5)], count, seed)
    assert found is not None
    return found


def test_a_sample_takes_the_same_tokens_of_every_input_in_their_order() -> None:
    sample = sampled(9)
    (numbers,), states = sample.args, sample.kwargs["states"]
    assert numbers.shape == (1, 9)
    assert states.shape == (1, 9, 3)
    assert numbers[0].tolist() == sorted(set(numbers[0].tolist()))
    assert set(numbers[0].tolist()) < {*range(6), *range(100, 120)}
    assert torch.equal(states[..., 1], numbers.float())


@pytest.mark.parametrize("count", [26, 1000])
def test_a_sample_of_more_than_all_tokens_is_all_of_them(count: int) -> None:
    assert sampled(count).args[0][0].tolist() == [*range(6), *range(100, 120)]


def test_the_seed_decides_which_tokens_are_sampled() -> None:
    first, again, other = (sampled(9, seed).args[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_larger_sample_contains_the_smaller_one() -> None:
    assert set(sampled(5).args[0][0].tolist()) < set(sampled(9).args[0][0].tolist())


def test_an_input_that_is_none_stays_none() -> None:
    sample = sample_tokens([Call((torch.zeros(2, 3, 4), None), {"mask": None})] * 2, 4, 0)
    assert sample is not None
    assert sample.args[0].shape == (1, 4, 4)
    assert (sample.args[1], sample.kwargs) == (None, {"mask": None})


@pytest.mark.parametrize("other", [torch.zeros(3, 2), 7])
def test_a_block_that_takes_more_than_tokens_has_no_sample(other: object) -> None:
    assert sample_tokens([Call((torch.zeros(2, 3, 4), other))], 4, 0) is None
