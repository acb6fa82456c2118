"""Losses of subsets read off the products of expert outputs: against the outputs, and the search for the least one.

E experts, T tokens, H hidden size.
"""

from collections.abc import Callable
from itertools import combinations
from math import comb

import numpy as np
import pytest
from numpy.typing import NDArray

from hcsmoe_hub.methods.pruning import DroppedEnergy, ScaledResidual, least_loss
from hcsmoe_hub.methods.pruning.gram import SubsetLoss
from hcsmoe_hub.methods.pruning.search import BATCH, MOST_EXACT, exact_subset, greedy_subset
from hcsmoe_hub.methods.pruning.subsets import Subset

KINDS: tuple[type[SubsetLoss], ...] = (DroppedEnergy, ScaledResidual)
E, T, H = 8, 40, 5


def outputs(experts: int = E, seed: int = 0) -> NDArray[np.float64]:
    """Router-weighted outputs ``[E, T, H]`` of experts that are correlated, each chosen for a third of the tokens."""
    numbers = np.random.default_rng(seed)
    shared = numbers.normal(size=(T, H))
    scale = numbers.uniform(0.2, 2, size=(experts, 1, 1))
    chosen = numbers.random((experts, T, 1)) < 1 / 3
    return (numbers.normal(size=(experts, T, H)) + shared * numbers.normal(size=(experts, 1, 1))) * scale * chosen


def gram_of(outputs_ETH: NDArray[np.float64]) -> NDArray[np.float64]:
    flat = outputs_ETH.reshape(len(outputs_ETH), -1)
    return flat @ flat.T


def measured(kind: type[SubsetLoss], outputs_ETH: NDArray[np.float64], kept: tuple[int, ...]) -> float:
    """The loss of a subset, from the outputs."""
    flat_NE = outputs_ETH.reshape(len(outputs_ETH), -1).T
    whole_N = flat_NE.sum(1)
    factors = np.ones(len(kept))
    if kind is ScaledResidual:
        factors = np.linalg.lstsq(flat_NE[:, list(kept)], whole_N)[0]
    return float(np.square(whole_N - flat_NE[:, list(kept)] @ factors).sum())


def mask(kept: tuple[int, ...], experts: int = E) -> NDArray[np.bool_]:
    return np.isin(np.arange(experts), kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3, 7, 8])
def test_a_loss_is_the_squared_error_of_the_outputs(kind: type[SubsetLoss], count: int) -> None:
    found = outputs()
    subsets = list(combinations(range(E), count))
    expected = [measured(kind, found, kept) for kept in subsets]
    energy = float(np.square(found.sum(0)).sum())
    assert kind(gram_of(found)).of(np.array(subsets)) == pytest.approx(expected, rel=1e-6, abs=1e-6 * energy)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [(2,), (0, 3, 5), (0, 1, 2, 4, 5, 6, 7)])
def test_one_more_one_fewer_and_an_exchange_are_foreseen(kind: type[SubsetLoss], kept: tuple[int, ...]) -> None:
    loss = kind(gram_of(outputs()))
    kept_E = mask(kept)
    without, with_one, exchanged = loss.without(kept_E), loss.with_one(kept_E), loss.exchanged(kept_E)
    for expert in range(E):
        fewer, more = tuple(set(kept) - {expert}), tuple({*kept, expert})
        if expert not in kept:
            assert without[expert] == np.inf
            assert with_one[expert] == pytest.approx(loss.of(np.array([more]))[0])
            assert (exchanged[expert] == np.inf).all()
            continue
        assert with_one[expert] == np.inf
        assert without[expert] == pytest.approx(loss.of(np.array([fewer], dtype=np.intp))[0])
        for other in range(E):
            if other in kept:
                assert exchanged[expert, other] == np.inf
            else:
                assert exchanged[expert, other] == pytest.approx(loss.of(np.array([(*fewer, other)]))[0])


@pytest.mark.parametrize("kind", KINDS)
def test_scaled_experts_lose_no_more_than_unscaled_ones(kind: type[SubsetLoss]) -> None:
    gram = gram_of(outputs())
    subsets = np.array(list(combinations(range(E), 4)))
    assert (ScaledResidual(gram).of(subsets) <= DroppedEnergy(gram).of(subsets)).all()


# The search


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 4, 7, 8])
@pytest.mark.parametrize("protected", [frozenset[int](), frozenset({6})])
def test_the_exact_subset_is_the_best_of_all(kind: type[SubsetLoss], count: int, protected: frozenset[int]) -> None:
    for seed in range(5):
        found = outputs(seed=seed)
        allowed = [kept for kept in combinations(range(E), count) if protected <= set(kept)]
        best = min(allowed, key=lambda kept: measured(kind, found, kept))
        assert exact_subset(kind(gram_of(found)), count, protected) == best


def test_more_subsets_than_are_tried_at_once_are_all_tried() -> None:
    assert comb(15, 6) > BATCH
    costs = np.random.default_rng(0).permutation(15) + 1.0
    assert exact_subset(DroppedEnergy(np.diag(costs)), 6) == tuple(sorted(np.argsort(-costs)[:6]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_greedy_subset_is_never_better_than_the_exact_one_and_rarely_worse(kind: type[SubsetLoss]) -> None:
    equal = 0
    for seed in range(20):
        loss = kind(gram_of(outputs(10, seed)))
        exact, greedy = exact_subset(loss, 5), greedy_subset(loss, 5)
        lowest, found = loss.of(np.array([exact, greedy]))
        assert found >= lowest * (1 - 1e-9)
        equal += exact == greedy
    assert equal >= 15


@pytest.mark.parametrize("kind", KINDS)
def test_no_exchange_improves_a_greedy_subset_of_many_experts(kind: type[SubsetLoss]) -> None:
    assert comb(40, 20) > MOST_EXACT
    loss = kind(gram_of(outputs(40)))
    kept = least_loss(loss, 20, frozenset({3, 39}))
    assert {3, 39} < set(kept)
    assert list(kept) == sorted(set(kept))
    found = loss.of(np.array([kept]))[0]
    exchanged = loss.exchanged(mask(kept, 40))
    exchanged[[3, 39]] = np.inf
    assert exchanged.min() >= found * (1 - 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("search", [exact_subset, greedy_subset])
def test_experts_that_no_token_reached_go_first(
    kind: type[SubsetLoss], search: Callable[[SubsetLoss, int], Subset]
) -> None:
    found = outputs()
    found[[1, 4]] = 0
    assert search(kind(gram_of(found)), 6) == (0, 2, 3, 5, 6, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_whose_experts_were_never_chosen_keeps_the_first_ones(kind: type[SubsetLoss]) -> None:
    assert least_loss(kind(np.zeros((6, 6))), 2) == (0, 1)
