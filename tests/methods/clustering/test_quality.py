"""Silhouette and Dunn index: their definitions, and where they say nothing."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform

from hcsmoe_hub.methods.clustering import dunn, silhouette


def line(*places: float) -> NDArray[np.float64]:
    return np.abs(np.subtract.outer(places, places))


def test_the_silhouette_of_two_pairs() -> None:
    # a = 1 for everyone; b = (4 + 5) / 2, (3 + 4) / 2 and the same from the other side.
    expected = (2 * (4.5 - 1) / 4.5 + 2 * (3.5 - 1) / 3.5) / 4
    assert silhouette(line(0, 1, 4, 5), [0, 0, 1, 1]) == pytest.approx(expected)


def test_experts_that_are_alone_count_zero_in_the_silhouette() -> None:
    # b of the pair is the distance to the single expert: (10 - 1) / 10 and (9 - 1) / 9.
    assert silhouette(line(0, 1, 10), [0, 0, 1]) == pytest.approx((9 / 10 + 8 / 9 + 0) / 3)


@pytest.mark.parametrize("seed", range(5))
def test_the_silhouette_follows_its_definition_expert_by_expert(seed: int) -> None:
    generator = np.random.default_rng(seed)
    distances = squareform(pdist(generator.normal(size=(15, 3))))
    labels = np.concatenate([np.arange(4), generator.integers(0, 4, 11)])
    values = []
    for expert in range(15):
        others = np.delete(np.arange(15), expert)
        means = [distances[expert, others[labels[others] == label]] for label in range(4)]
        if len(means[labels[expert]]) == 0:
            values.append(0.0)
            continue
        own = means[labels[expert]].mean()
        nearest = min(means[label].mean() for label in range(4) if label != labels[expert])
        values.append((nearest - own) / max(nearest, own))
    assert silhouette(distances, labels.tolist()) == pytest.approx(np.mean(values))


def test_the_names_of_clusters_do_not_matter() -> None:
    distances = squareform(pdist(np.random.default_rng(5).normal(size=(9, 3))))
    first, second = [0, 0, 1, 1, 2, 2, 0, 1, 2], [7, 7, 3, 3, 5, 5, 7, 3, 5]
    assert silhouette(distances, first) == pytest.approx(silhouette(distances, second))
    assert dunn(distances, first) == dunn(distances, second)


def test_clusters_that_are_far_apart_are_better_than_others() -> None:
    distances = line(0, 1, 2, 20, 21, 22)
    good, bad = [0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1]
    good_silhouette, bad_silhouette = silhouette(distances, good), silhouette(distances, bad)
    assert good_silhouette is not None
    assert bad_silhouette is not None
    assert good_silhouette > 0.9 > 0 > bad_silhouette
    assert dunn(distances, good) == 18 / 2
    assert dunn(distances, bad) == 1 / 21


def test_the_silhouette_is_undefined_for_one_cluster_and_for_nothing_but_single_experts() -> None:
    distances = line(0, 1, 3)
    assert silhouette(distances, [0, 0, 0]) is None
    assert silhouette(distances, [0, 1, 2]) is None


def test_equal_experts_in_different_clusters_count_zero_in_the_silhouette() -> None:
    assert silhouette(np.zeros((4, 4)), [0, 0, 1, 1]) == 0


def test_the_dunn_index_is_undefined_for_one_cluster_and_for_clusters_of_width_zero() -> None:
    assert dunn(line(0, 1, 3), [0, 0, 0]) is None
    assert dunn(line(0, 1, 3), [0, 1, 2]) is None
    assert dunn(line(0, 0, 3), [0, 0, 1]) is None
