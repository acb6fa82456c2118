"""Random partitions: exactly K clusters, from a seed, favouring nobody."""

import numpy as np
import pytest

from hcsmoe_hub.methods.clustering import random_groups


@pytest.mark.parametrize("clusters", [1, 2, 7, 11, 12])
def test_there_are_exactly_k_clusters(clusters: int) -> None:
    for seed in range(50):
        assert set(random_groups(12, clusters, seed).tolist()) == set(range(clusters))


def test_the_seed_decides_the_result() -> None:
    assert random_groups(20, 5, 3).tolist() == random_groups(20, 5, 3).tolist()
    assert len({tuple(random_groups(20, 5, seed).tolist()) for seed in range(10)}) == 10


def test_every_pair_of_experts_meets_equally_often() -> None:
    draws = np.stack([random_groups(6, 3, seed) for seed in range(3000)])
    meetings = (draws[:, :, None] == draws[:, None]).mean(axis=0)[np.triu_indices(6, 1)]
    # 15 shares with a standard error of about 0.008 each.
    assert np.ptp(meetings) < 0.06
