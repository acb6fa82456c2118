"""How far a converted MoE block is from the one it stands for, on the same tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.methods.clustering import Clusters
from hcsmoe_hub.methods.routing import top_k_agreement
from hcsmoe_hub.observation.observers import RoutedObserver, TiedObserver
from hcsmoe_hub.observation.statistics import Call, pick_tokens, spaced
from hcsmoe_hub.observation.watcher import Observation

# More tokens change what is measured little.
COMPARED_TOKENS = 32768
CALL_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """What a conversion changed in one layer.

    Attributes:
        output_error: ``||new - old|| / ||old||`` of the routed outputs over all tokens.
        top_k_agreement: Share of the clusters chosen by the full router that the new one chooses as well.
        tokens: Number of tokens it was measured on.
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
    calls, top_k, outputs = _some(layer, seen)
    with layer.reduced(changed) as reduced:
        observer = reduced.rerun(calls, RoutedObserver)
    agreement = top_k_agreement(torch.cat(top_k), torch.cat(observer.top_k), clusters)
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
    calls, _, outputs = _some(layer, seen)
    observer = layer.source.rerun(calls, lambda: TiedObserver(clusters.labels, count))
    # The router is the same, so it chooses the same clusters.
    return _deviation(outputs, observer, 1.0)


def _some(layer: LayerContext, seen: Observation) -> tuple[list[Call], list[Tensor], list[Tensor]]:
    """Inputs, choices and outputs of a block on evenly spaced tokens; on all where it cannot run on single ones."""
    total = sum(map(len, seen.outputs))
    if total <= COMPARED_TOKENS or not layer.source.runs_on_tokens(seen.calls):
        return seen.calls, seen.top_k, seen.outputs
    chosen = spaced(torch.arange(total), COMPARED_TOKENS)
    calls = [pick_tokens(seen.calls, part) for part in chosen.split(CALL_TOKENS)]
    return calls, [torch.cat(seen.top_k)[chosen]], list(torch.cat(seen.outputs)[chosen].split(CALL_TOKENS))


def _deviation(outputs: list[Tensor], observer: RoutedObserver, agreement: float) -> Deviation:
    return Deviation(
        output_error=relative_error(outputs, observer.outputs),
        top_k_agreement=agreement,
        tokens=sum(map(len, outputs)),
    )


def relative_error(old: list[Tensor], new: list[Tensor]) -> float:
    """``||new - old|| / ||old||`` over lists of equal tensors, summed in float64; 0 if both are zero."""
    difference = sum(_squared_norm(b.float() - a.float()) for a, b in zip(old, new, strict=True))
    size = sum(_squared_norm(a.float()) for a in old)
    return (difference / size) ** 0.5 if size else 0.0


def _squared_norm(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
