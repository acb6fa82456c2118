"""Draws the tree of a hierarchical clustering in characters.

Leaves stand at the left, one per line; every merge is a bar at the column of its height, and a dotted line at the cut
crosses one branch per cluster.
"""

from collections.abc import Mapping, Sequence

# Directions in which a cell is connected.
LEFT, RIGHT, UP, DOWN = 1, 2, 4, 8
BOX: Mapping[int, str] = {
    0: " ",
    LEFT: "─",
    RIGHT: "─",
    LEFT | RIGHT: "─",
    UP: "│",
    DOWN: "│",
    UP | DOWN: "│",
    LEFT | DOWN: "┐",
    LEFT | UP: "┘",
    RIGHT | DOWN: "┌",
    RIGHT | UP: "└",
    LEFT | RIGHT | DOWN: "┬",
    LEFT | RIGHT | UP: "┴",
    LEFT | UP | DOWN: "┤",
    RIGHT | UP | DOWN: "├",
    LEFT | RIGHT | UP | DOWN: "┼",
}
ASCII: Mapping[int, str] = {
    bits: " " if not bits else "-" if bits & ~(LEFT | RIGHT) == 0 else "|" if bits & ~(UP | DOWN) == 0 else "+"
    for bits in BOX
}
BOX_CUT, ASCII_CUT = "┊", ":"
MAX_LEAVES = 64
# A drawing needs a column for leaves, merges on both sides of the cut, and the cut.
MIN_COLUMNS = 16

Tree = Sequence[Sequence[float]]


def dendrogram(
    tree: Tree, labels: Sequence[int], width: int, *, is_ascii: bool = False, is_share: bool = False
) -> list[str]:
    """Draws a tree and where it is cut into clusters.

    Args:
        tree: ``[left, right, height]`` of each of the N - 1 merges in ascending order of height; leaves are numbered
            from 0, and merge ``k`` makes number ``N + k``. Further columns are ignored.
        labels: Cluster of every leaf, ``[N]``, numbered by first appearance; their number K decides where the tree is
            cut: after N - K merges.
        width: Characters per line that may be used.
        is_ascii: Draw with ``-``, ``|`` and ``+``.
        is_share: Write heights in percent.

    Returns:
        A line with the number of clusters, a line per leaf, and a line with the heights. Of a tree with more than
        ``MAX_LEAVES`` leaves every cluster is one line.
    """
    leaves = len(labels)
    clusters = max(labels) + 1
    merges = [(int(left), int(right), float(height)) for left, right, height, *_ in tree]
    texts = {leaf: str(leaf) for leaf in range(leaves)}
    below = leaves - clusters
    if leaves > MAX_LEAVES:
        texts = _collapsed(merges[:below], leaves, width // 2)
        drawn = range(below, len(merges))
    else:
        drawn = range(len(merges))
    heights = [merges[number][2] for number in drawn]
    # Above the cut alone, heights fill the width from the lowest on.
    lowest = heights[0] if heights and drawn.start else 0.0
    label_width = max(map(len, texts.values())) + 1
    columns = max(MIN_COLUMNS, width - label_width)
    column_of, cut = _columns(heights, below - drawn.start, columns, lowest)
    order = _leaf_order(merges, leaves, set(texts))
    grid = [[0] * columns for _ in order]
    row_of = {leaf: row for row, leaf in enumerate(order)}
    end_of = dict.fromkeys(order, 0)
    for number, column in zip(drawn, column_of, strict=True):
        children = merges[number][:2]
        rows = sorted(row_of[child] for child in children)
        for child in children:
            _horizontal(grid[row_of[child]], end_of[child], column)
        _vertical(grid, column, rows[0], rows[1])
        row_of[leaves + number], end_of[leaves + number] = sum(rows) // 2, column
    glyphs, dots = (ASCII, ASCII_CUT) if is_ascii else (BOX, BOX_CUT)
    lines = [_line(cells, glyphs, cut, dots) for cells in grid]
    body = [f"{texts[leaf]:>{label_width - 1}} {line}".rstrip() for leaf, line in zip(order, lines, strict=True)]
    margin = " " * label_width
    head = [margin + _heading(cut, columns, dots, clusters)] if cut is not None else []
    return [*head, *body, margin + _axis(lowest, max(heights, default=0.0), columns, is_share=is_share)]


def _collapsed(merges: Sequence[tuple[int, int, float]], leaves: int, width: int) -> dict[int, str]:
    """The subtrees that are left after some merges, with their leaves in words."""
    members = {leaf: [leaf] for leaf in range(leaves)}
    for number, (left, right, _) in enumerate(merges):
        members[leaves + number] = sorted(members.pop(left) + members.pop(right))
    texts = {}
    for node, found in members.items():
        text = ",".join(map(str, found))
        count = f" ({len(found)})" if len(found) > 1 else ""
        room = width - len(count)
        texts[node] = (text if len(text) <= room else f"{text[: room - 3].rpartition(',')[0]},..") + count
    return texts


def _columns(heights: Sequence[float], below: int, columns: int, lowest: float) -> tuple[list[int], int | None]:
    """Column of every merge, and of the cut between the first ``below`` merges and the others.

    The first column is at the height ``lowest``.

    The cut is ``None`` where no merge is above it. Merges on its two sides never share its column, not even where their
    heights are equal.
    """
    last = columns - 1
    extent = (max(heights, default=lowest) - lowest) or 1.0
    natural = [max(1, round((height - lowest) / extent * last)) for height in heights]
    if below == len(heights):
        return natural, None
    middle = (natural[below - 1] + natural[below]) // 2 if below else 1
    cut = min(max(middle, 2 if below else 1), last - 1)
    return [min(column, cut - 1) for column in natural[:below]] + [
        max(column, cut + 1) for column in natural[below:]
    ], cut


def _leaf_order(merges: Sequence[tuple[int, int, float]], leaves: int, drawn: set[int]) -> list[int]:
    """The nodes that are drawn as leaves, from top to bottom: without crossings, the lowest expert first."""
    lowest = list(range(leaves))
    for left, right, _ in merges:
        lowest.append(min(lowest[left], lowest[right]))
    order, stack = [], [len(lowest) - 1]
    while stack:
        node = stack.pop()
        if node in drawn:
            order.append(node)
        else:
            # What is pushed last comes out first.
            stack += sorted(merges[node - leaves][:2], key=lambda child: -lowest[child])
    return order


def _horizontal(cells: list[int], start: int, end: int) -> None:
    """Connects two cells of a row."""
    for column in range(start, end):
        cells[column] |= RIGHT
        cells[column + 1] |= LEFT


def _vertical(grid: list[list[int]], column: int, top: int, bottom: int) -> None:
    """Connects two cells of a column."""
    for row in range(top, bottom):
        grid[row][column] |= DOWN
        grid[row + 1][column] |= UP


def _line(cells: Sequence[int], glyphs: Mapping[int, str], cut: int | None, dots: str) -> str:
    return "".join(dots if column == cut and not bits else glyphs[bits] for column, bits in enumerate(cells))


def _heading(cut: int, columns: int, dots: str, clusters: int) -> str:
    """The number of clusters, next to the cut that makes them."""
    text = f"{clusters} clusters" if clusters > 1 else "1 cluster"
    fits = cut + len(text) + 2 <= columns
    return f"{' ' * cut}{dots} {text}" if fits else f"{f'{text} '.rjust(cut)}{dots}"


def _axis(lowest: float, highest: float, columns: int, *, is_share: bool) -> str:
    """Heights at both ends."""
    start, end = (f"{100 * height:.4g} %" if is_share else f"{height:.4g}" for height in (lowest, highest))
    return start + end.rjust(columns - len(start))


def is_cut(tree: Tree, labels: Sequence[int]) -> bool:
    """Whether clusters are exactly what is left after the first N - K merges of a tree; see ``dendrogram``."""
    leaves, clusters = len(labels), max(labels) + 1
    members = {leaf: [leaf] for leaf in range(leaves)}
    for number, (left, right, *_) in enumerate(tree[: leaves - clusters]):
        members[leaves + number] = members.pop(int(left)) + members.pop(int(right))
    return all(len({labels[leaf] for leaf in found}) == 1 for found in members.values())
