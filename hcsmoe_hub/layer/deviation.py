"""How far a converted MoE block is from the one it stands for, on tokens that both have seen."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hcsmoe_hub.layer.reduced_block import load_reduced
from hcsmoe_hub.methods.clustering import Clusters
from hcsmoe_hub.methods.routing import top_k_agreement
from hcsmoe_hub.model.blocks import MoEBlock
from hcsmoe_hub.model.layer_loader import free
from hcsmoe_hub.model.microbatch import MicroBatcher
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.observation.observers import RoutedObserver, TiedObserver
from hcsmoe_hub.observation.watcher import Observation, rerun


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
    model: SourceModel,
    reduced: Skeleton,
    block: MoEBlock,
    changed: Mapping[str, Tensor],
    clusters: Clusters,
    seen: Observation,
    batcher: MicroBatcher,
) -> Deviation:
    """Runs a block of K experts and K router rows.

    Args:
        model: The source, the layer's weights in memory.
        reduced: Skeleton of the result.
        block: The block.
        changed: Its tensors in the result, by parameter name.
        clusters: Which source experts each new one stands for.
        seen: Inputs and outputs of the block in the source.
        batcher: Knows the device.
    """
    moe = load_reduced(model, reduced, block, changed, batcher.device)
    observer = _run(model, moe, reduced.module.get_submodule(block.experts_path), block, seen, RoutedObserver, batcher)
    free(moe)
    agreement = top_k_agreement(torch.cat(seen.top_k), torch.cat(observer.top_k), clusters)
    return _deviation(seen, observer, agreement)


def compare_tied(
    model: SourceModel,
    block: MoEBlock,
    merged: Mapping[str, Tensor],
    clusters: Clusters,
    seen: Observation,
    batcher: MicroBatcher,
) -> Deviation:
    """Runs K experts under the source's own router of N rows; the source's experts give way to them.

    Args:
        model: The source, the layer's weights in memory.
        block: The block.
        merged: Tensors of its K experts, by parameter name.
        clusters: Which of them each router row leads to.
        seen: Inputs and outputs of the block in the source.
        batcher: Knows the device.
    """
    source = model.skeleton.module
    for name, tensor in merged.items():
        owner, _, attribute = name.rpartition(".")
        value = nn.Parameter(tensor.to(batcher.device, model.skeleton.dtype), requires_grad=False)
        source.get_submodule(owner)._parameters[attribute] = value
    moe, experts = source.get_submodule(block.path), source.get_submodule(block.experts_path)
    count = len(clusters.members)
    observer = _run(model, moe, experts, block, seen, lambda: TiedObserver(clusters.labels, count), batcher)
    # The router is the same, so it chooses the same clusters.
    return _deviation(seen, observer, 1.0)


def _run(
    model: SourceModel,
    moe: nn.Module,
    experts: nn.Module,
    block: MoEBlock,
    seen: Observation,
    make_observer: Callable[[], RoutedObserver],
    batcher: MicroBatcher,
) -> RoutedObserver:
    whole = model.is_whole_layer(block)
    return rerun(moe, experts, seen.calls, make_observer, batcher=batcher, whole_layer=whole)


def _deviation(seen: Observation, observer: RoutedObserver, agreement: float) -> Deviation:
    return Deviation(
        output_error=relative_error(seen.outputs, observer.outputs),
        top_k_agreement=agreement,
        tokens=sum(len(outputs) for outputs in seen.outputs),
    )


def relative_error(old: list[Tensor], new: list[Tensor]) -> float:
    """``||new - old|| / ||old||`` over lists of equal tensors, summed in float64; 0 if both are zero."""
    difference = sum(_squared_norm(b.float() - a.float()) for a, b in zip(old, new, strict=True))
    size = sum(_squared_norm(a.float()) for a in old)
    return (difference / size) ** 0.5 if size else 0.0


def _squared_norm(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
