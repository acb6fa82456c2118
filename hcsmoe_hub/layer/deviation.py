"""How far a converted MoE block is from the one it stands for, on the same tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.machine import ranks
from hcsmoe_hub.methods.clustering import Clusters
from hcsmoe_hub.methods.routing import top_k_agreement
from hcsmoe_hub.methods.totals import total
from hcsmoe_hub.observation.observers import RoutedObserver, RouterObserver, TiedObserver
from hcsmoe_hub.observation.statistics import Call, between, pick_rows, pick_tokens, spaced
from hcsmoe_hub.observation.watcher import Observation

# The share of the tokens that is measured on, but at least and at most so many: more change what is measured little,
# and would double the arithmetic of methods that do nothing but run the experts.
COMPARED_SHARE = 0.25
LEAST_TOKENS, MOST_TOKENS = 1024, 4096
# A router alone is cheap, and its choices are counted one by one.
ROUTED_TOKENS = 32768
# Numbers that are compared at a time, in float32.
CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """What a conversion changed in one layer.

    Attributes:
        output_error: ``||new - old|| / ||old||`` of the routed outputs.
        top_k_agreement: Share of the clusters chosen by the full router that the new one chooses as well.
        tokens: Number of tokens that the error was measured on.
    """

    output_error: float
    top_k_agreement: float
    tokens: int


def compare_reduced(
    layer: LayerContext, changed: Mapping[str, Tensor], *, clusters: Clusters, seen: Observation
) -> Deviation:
    """Runs a block of K experts and K router rows.

    Args:
        layer: The layer.
        changed: Tensors of its block in the result, by parameter name.
        clusters: Which source experts each new one stands for.
        seen: Inputs and outputs of the block in the source.
    """
    calls, top_k, outputs = _some(layer, seen, _compared_tokens(layer, seen))
    with layer.reduced(changed) as reduced:
        observer = reduced.rerun(calls, RoutedObserver)
        found = observer.top_k
        if len(outputs) == 1 and len(outputs[0]) < sum(map(len, seen.outputs)):
            calls, top_k, _ = _some(layer, seen, ROUTED_TOKENS)
            found = reduced.rerun(calls, RouterObserver).top_k
    agreement = _shared_agreement(torch.cat(top_k), torch.cat(found), clusters)
    return _deviation(outputs, observer, agreement)


def compare_tied(
    layer: LayerContext, merged: Mapping[str, Tensor], *, clusters: Clusters, seen: Observation
) -> Deviation:
    """Runs K experts under the source's own router of N rows, in place of the source's experts.

    Args:
        layer: The layer.
        merged: Tensors of its K experts, by parameter name.
        clusters: Which of them each router row leads to.
        seen: Inputs and outputs of the block in the source.
    """
    source = layer.source.skeleton
    for name, tensor in merged.items():
        owner, _, attribute = name.rpartition(".")
        value = nn.Parameter(tensor.to(layer.device, source.dtype), requires_grad=False)
        source.module.get_submodule(owner).register_parameter(attribute, value)
    count = len(clusters.members)
    calls, _, outputs = _some(layer, seen, _compared_tokens(layer, seen))
    observer = layer.source.rerun(calls, lambda: TiedObserver(clusters.labels, count))
    # The router is the same, so it chooses the same clusters.
    return _deviation(outputs, observer, 1.0)


def _compared_tokens(layer: LayerContext, seen: Observation) -> int:
    """Tokens that outputs are compared on."""
    _, total = ranks.place(sum(map(len, seen.outputs)), layer.device)
    return min(MOST_TOKENS, max(LEAST_TOKENS, int(COMPARED_SHARE * total)))


def _some(layer: LayerContext, seen: Observation, count: int) -> tuple[list[Call], list[Tensor], list[Tensor]]:
    """Inputs, choices and outputs of a block on evenly spaced tokens; on all where it cannot run on single ones."""
    own = sum(map(len, seen.outputs))
    start, total = ranks.place(own, layer.device)
    if total <= count or not layer.source.runs_on_tokens(seen.calls):
        return seen.calls, seen.top_k, seen.outputs
    chosen = between(spaced(torch.arange(total), count), start, own)
    return [pick_tokens(seen.calls, chosen)], [pick_rows(seen.top_k, chosen)], [pick_rows(seen.outputs, chosen)]


def _deviation(outputs: list[Tensor], observer: RoutedObserver, agreement: float) -> Deviation:
    found = observer.outputs[0]
    tokens = ranks.add_up(torch.tensor([sum(map(len, outputs))], device=found.device))
    return Deviation(
        output_error=shared_error(outputs, observer.outputs), top_k_agreement=agreement, tokens=int(tokens)
    )


def _shared_agreement(full_TK: Tensor, reduced_TK: Tensor, clusters: Clusters) -> float:
    """Agreement of the choices of all ranks, each of which has its own."""
    own = top_k_agreement(full_TK, reduced_TK.to(full_TK.device), clusters)
    if not ranks.is_shared():
        return own
    count = len(full_TK)
    shares = ranks.add_up(torch.tensor([own * count, count], dtype=torch.float64, device=full_TK.device))
    return float(shares[0] / shares[1])


def relative_error(old: list[Tensor], new: list[Tensor]) -> float:
    """``||new - old|| / ||old||`` over lists of equal tensors, summed in float64; 0 if both are zero.

    Waits once for the device of ``new``. The lists may be cut in different places.
    """
    return _error(_squares(old, new))


def shared_error(old: list[Tensor], new: list[Tensor]) -> float:
    """The same over the tensors of all ranks, each of which has its own."""
    return _error(ranks.add_up(_squares(old, new)))


def _squares(old: list[Tensor], new: list[Tensor]) -> Tensor:
    """Squared norms of the difference and of the old tensors, ``[2]`` float64."""
    if len(old) != len(new):
        old, new = [torch.cat(old)], [torch.cat(new)]
    sums = torch.zeros(2, dtype=torch.float64, device=new[0].device)
    for a, b in zip(old, new, strict=True):
        rows = max(1, CHUNK_ELEMENTS // max(1, b[0].numel()))
        for some, others in zip(a.split(rows), b.split(rows), strict=True):
            before = some.to(b.device).float()
            sums += torch.stack([_squared_norm(others.float() - before), _squared_norm(before)])
    return sums


def _error(squares: Tensor) -> float:
    difference, size = squares.tolist()
    return float((difference / size) ** 0.5) if size else 0.0


def _squared_norm(values: Tensor) -> Tensor:
    return total(values.square(), dtype=torch.float64)
