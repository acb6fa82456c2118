"""How many clusters each layer gets, where layers may differ."""

from collections.abc import Sequence

from hcsmoe_hub.errors import PlanError


def frequency_budget(usage: Sequence[Sequence[int]], average: int, floor: int | Sequence[int]) -> tuple[int, ...]:
    """Gives each layer as many clusters as it has experts among the globally most frequent (HC-SMoE, B.1).

    Frequencies are normalised inside each layer, ``f_le = n_le / sum_e n_le``. The ``floor`` most frequent experts of
    every layer count first, then the most frequent of all others, until exactly ``average * layers`` are found. With a
    floor of 1 this is M-SMoE's rule, which sets the highest frequency of every layer to 1 before it takes the highest
    overall. The published code of both papers compares with a threshold instead, which gives one group too many
    (``>=``) or, where frequencies are equal, too few (``>``).

    Args:
        usage: How many tokens chose each expert, one sequence per layer; layers may differ in length.
        average: Clusters per layer, on average.
        floor: Least clusters of every layer, or of each.

    Returns:
        Clusters of every layer: at least its floor, at most its experts, ``average * layers`` in total. Among equal
        frequencies, the lower layer and then the lower expert comes first.

    Raises:
        PlanError: If the floors or the experts of the layers rule that total out.
    """
    layers, total = len(usage), average * len(usage)
    floors = [floor] * layers if isinstance(floor, int) else list(floor)
    sizes = [len(counts) for counts in usage]
    for layer, (least, size) in enumerate(zip(floors, sizes, strict=True)):
        if not 0 <= least <= size:
            raise PlanError(
                f"MoE layer number {layer} must keep at least {least} experts, but it has {size}.",
                hint="keep fewer experts, or protect fewer",
            )
    if not sum(floors) <= total <= sum(sizes):
        raise PlanError(
            f"{layers} MoE layers with {average} experts on average keep {total}, "
            f"but they must keep {sum(floors)} to {sum(sizes)}.",
            hint="keep another number of experts, or protect fewer",
        )
    result, others = list(floors), []
    for layer, counts in enumerate(usage):
        tokens = max(sum(counts), 1)
        ranked = sorted((-count / tokens, layer, expert) for expert, count in enumerate(counts))
        others += ranked[floors[layer] :]
    for _, layer, _ in sorted(others)[: total - sum(floors)]:
        result[layer] += 1
    return tuple(result)
