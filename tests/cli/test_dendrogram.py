"""A tree in characters: who merges with whom, where it is cut, and how much room it takes."""

import time

import numpy as np
import pytest
from scipy.cluster.hierarchy import linkage

from hcsmoe_hub.cli.dendrogram import MAX_LEAVES, dendrogram, is_cut

# 0 and 2 meet at 1, 1 and 3 at 2, all of them at 4.
SMALL = [[0, 2, 1.0], [1, 3, 2.0], [4, 5, 4.0]]


def random_tree(leaves, *, seed=0, method="average"):
    """A tree over random points, and labels after any number of its merges."""
    tree = linkage(np.random.default_rng(seed).normal(size=(leaves, 3)), method=method).tolist()

    def labels(clusters):
        members = {leaf: [leaf] for leaf in range(leaves)}
        for number, (left, right, *_) in enumerate(tree[: leaves - clusters]):
            members[leaves + number] = members.pop(int(left)) + members.pop(int(right))
        cluster_of = {leaf: node for node, found in members.items() for leaf in found}
        order = list(dict.fromkeys(cluster_of[leaf] for leaf in range(leaves)))
        return [order.index(cluster_of[leaf]) for leaf in range(leaves)]

    return tree, labels


def test_small_tree_is_drawn_with_its_cut():
    assert dendrogram(SMALL, [0, 1, 0, 1], 30) == [
        "           2 clusters ┊",
        "0 ───────┬───────────────────┐",
        "2 ───────┘            ┊      │",
        "1 ──────────────┬────────────┘",
        "3 ──────────────┘     ┊",
        "  0                          4",
    ]


def test_ascii_tree_has_the_same_shape():
    box, plain = (dendrogram(SMALL, [0, 1, 0, 1], 40, is_ascii=is_ascii) for is_ascii in (False, True))
    shape = str.maketrans("─│┐┘┬┴├┤┼┊", "-|+++++++:")
    assert [line.translate(shape) for line in box] == plain
    assert all(line.isascii() for line in plain)


def test_single_cluster_has_no_cut():
    lines = dendrogram(SMALL, [0, 0, 0, 0], 40)
    assert len(lines) == 5
    assert "┊" not in "".join(lines)


def test_cut_below_all_merges_is_at_the_left():
    heading, *rows, _ = dendrogram(SMALL, [0, 1, 2, 3], 40)
    assert heading == "   ┊ 4 clusters"
    assert all(set(row[2:4]) == {"─"} for row in rows)


def test_equal_heights_are_cut_by_order():
    tree = [[0, 1, 1.0], [2, 3, 1.0], [4, 5, 1.0]]
    heading, *rows, _ = dendrogram(tree, [0, 0, 1, 2], 40)
    cut = heading.index("┊")
    crossing = [row for row in rows if row[cut] == "─"]
    # One branch for each of the three clusters.
    assert [row.split()[0] for row in crossing] == ["0", "2", "3"]


@pytest.mark.parametrize("method", ["single", "complete", "average", "ward"])
@pytest.mark.parametrize(("leaves", "clusters"), [(8, 3), (60, 12), (60, 59), (MAX_LEAVES, 2)])
def test_every_cluster_crosses_the_cut_once(leaves, clusters, method):
    tree, labels = random_tree(leaves, method=method)
    heading, *rows, _ = dendrogram(tree, labels(clusters), 100)
    cut = heading.index("┊")
    assert f"{clusters} clusters" in heading
    assert sum(row[cut : cut + 1] == "─" for row in rows) == clusters


@pytest.mark.parametrize("width", [40, 80, 133])
@pytest.mark.parametrize(("leaves", "clusters"), [(2, 1), (8, 4), (60, 30), (200, 20), (512, 256)])
def test_no_line_is_wider_than_asked(leaves, clusters, width):
    tree, labels = random_tree(leaves)
    assert max(map(len, dendrogram(tree, labels(clusters), width))) <= width


def test_leaves_stand_so_that_no_branches_cross():
    tree, labels = random_tree(60)
    _, *rows, _ = dendrogram(tree, labels(60), 100)
    order = [int(row.split()[0]) for row in rows]
    assert sorted(order) == list(range(60))
    members = {leaf: {leaf} for leaf in range(60)}
    for number, (left, right, *_) in enumerate(tree):
        found = members[60 + number] = members[int(left)] | members[int(right)]
        places = [order.index(leaf) for leaf in found]
        assert max(places) - min(places) == len(places) - 1


def test_large_tree_has_one_line_per_cluster():
    tree, labels = random_tree(512)
    chosen = labels(40)
    lines = dendrogram(tree, chosen, 100)
    assert len(lines) == 40 + 2
    sizes = [int(line.partition("(")[2].partition(")")[0]) if "(" in line else 1 for line in lines[1:-1]]
    assert sorted(sizes) == sorted(np.bincount(chosen))


def test_large_tree_is_drawn_at_once():
    tree, labels = random_tree(512, method="single")
    chosen = labels(400)
    start = time.perf_counter()
    dendrogram(tree, chosen, 120)
    assert time.perf_counter() - start < 0.5


def test_large_tree_with_one_cluster_is_one_line():
    tree, labels = random_tree(100)
    lines = dendrogram(tree, labels(1), 80)
    assert len(lines) == 2
    assert "(100)" in lines[0]


def test_heights_of_zero_are_drawn():
    lines = dendrogram([[0, 1, 0.0], [2, 3, 0.0]], [0, 0, 1], 40)
    assert len(lines) == 5


def test_axis_ends_at_the_greatest_height():
    assert dendrogram(SMALL, [0, 1, 0, 1], 40)[-1].split() == ["0", "4"]


def test_clusters_of_the_tree_differ_from_others():
    assert is_cut(SMALL, [0, 1, 0, 1])
    assert is_cut(SMALL, [0, 1, 0, 2])
    assert not is_cut(SMALL, [0, 0, 1, 1])
