"""A partition of experts: how its labels are numbered and which member leads a cluster."""

import random

from hcsmoe_hub.methods.clustering import Clusters


def test_labels_are_numbered_by_first_appearance() -> None:
    assert Clusters.of([7, 3, 7, 0, 3]).labels == (0, 1, 0, 2, 1)


def test_any_naming_of_a_partition_gives_the_same_labels() -> None:
    choose = random.Random(0)
    for _ in range(50):
        labels = [choose.randrange(6) for _ in range(12)]
        names = choose.sample(range(100), 6)
        assert Clusters.of([names[label] for label in labels]) == Clusters.of(labels)


def test_numbering_canonical_labels_again_changes_nothing() -> None:
    clusters = Clusters.of([5, 5, 1, 9, 1])
    assert Clusters.of(clusters.labels) == clusters


def test_the_first_expert_is_in_cluster_zero_and_each_new_cluster_takes_the_next_number() -> None:
    choose = random.Random(1)
    for _ in range(50):
        labels = Clusters.of([choose.randrange(8) for _ in range(20)]).labels
        first = [labels.index(number) for number in range(max(labels) + 1)]
        assert first[0] == 0
        assert first == sorted(first)


def test_members_of_a_cluster_are_ascending_and_hold_every_expert_once() -> None:
    clusters = Clusters.of([2, 0, 2, 1, 0, 2])
    assert clusters.members == ((0, 2, 5), (1, 4), (3,))


def test_the_most_used_member_is_dominant() -> None:
    assert Clusters.of([0, 1, 0, 1, 0]).dominant([3, 9, 5, 2, 4]) == (2, 1)


def test_the_lowest_expert_is_dominant_among_equals() -> None:
    assert Clusters.of([0, 1, 0, 1, 0]).dominant([4, 7, 4, 7, 3]) == (0, 1)


def test_a_cluster_that_no_token_reached_is_led_by_its_lowest_expert() -> None:
    assert Clusters.of([0, 1, 1, 0]).dominant([0, 0, 0, 0]) == (0, 1)


def test_heights_are_kept_in_order_as_plain_numbers() -> None:
    clusters = Clusters.of([0, 0, 0], [1, 2.5])
    assert clusters.heights == (1.0, 2.5)
    assert all(type(height) is float for height in clusters.heights)
