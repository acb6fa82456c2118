"""Streaming statistics: sums by hand, and the same figures however the tokens were cut into micro-batches.

E experts, T tokens, F feature size, K experts per token.
"""

import pytest
import torch
from torch import Tensor

from hcsmoe_hub.calibration.statistics import ExpertStatistics

E, T, F, K = 5, 600, 12, 2


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def collect(top_k_TK: Tensor, features_ETF: Tensor, routed_TKF: Tensor, sizes: list[int]) -> ExpertStatistics:
    """Statistics of the same tokens in micro-batches of the given sizes."""
    statistics = ExpertStatistics.empty(len(features_ETF))
    start = 0
    for size in sizes:
        tokens = slice(start, start + size)
        statistics.count(top_k_TK[tokens])
        for expert, features_TF in enumerate(features_ETF):
            statistics.add_features(expert, features_TF[tokens])
            statistics.add_saliency(expert, routed_TKF[tokens][top_k_TK[tokens] == expert])
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
    whole = collect(top_k, features, routed, [T])
    for seed in range(5):
        sizes = random_cut(seed)
        assert len(sizes) == 21
        cut = collect(top_k, features, routed, sizes)
        assert cut.tokens == whole.tokens == T
        assert torch.equal(cut.usage_E, whole.usage_E)
        assert torch.allclose(cut.mean_features(), whole.mean_features(), rtol=1e-6, atol=1e-8)
        assert torch.allclose(cut.saliency(), whole.saliency(), rtol=1e-6, atol=0)


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
        statistics.add_saliency(0, torch.full((1, 1), value))
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


def test_saliency_is_the_mean_norm_of_the_weighted_outputs_over_the_tokens_routed_there() -> None:
    statistics = ExpertStatistics.empty(2)
    # Expert 0 sees two tokens with router weights 0.5 and 0.25, expert 1 sees one with 0.5.
    statistics.count(torch.tensor([[0, 1], [0, -1], [-1, -1]]))
    statistics.add_saliency(0, torch.tensor([[3.0, 4.0]]) * 0.5)
    statistics.add_saliency(0, torch.tensor([[6.0, 8.0]]) * 0.25)
    statistics.add_saliency(1, torch.tensor([[0.0, 1.0]]) * 0.5)
    assert statistics.saliency().tolist() == [(0.5 * 5 + 0.25 * 10) / 2, 0.5]


def test_an_expert_without_tokens_has_no_saliency() -> None:
    statistics = ExpertStatistics.empty(3)
    statistics.count(torch.tensor([[1]]))
    statistics.add_saliency(1, torch.tensor([[2.0]]))
    assert statistics.saliency().tolist() == [0, 2, 0]


def test_empty_statistics_hold_nothing() -> None:
    statistics = ExpertStatistics.empty(3)
    assert statistics.tokens == 0
    assert statistics.usage_E.tolist() == [0, 0, 0]
    assert statistics.saliency().tolist() == [0, 0, 0]
