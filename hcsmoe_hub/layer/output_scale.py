"""Merged experts whose outputs are as large as those of their members, whatever weights the reduced router gives."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.layer.deviation import shared_error
from hcsmoe_hub.layer.neuron_energies import added_up, even_calls, own_even_tokens, routed_tokens
from hcsmoe_hub.methods.clustering import Clusters
from hcsmoe_hub.observation.observers import RoutedObserver
from hcsmoe_hub.observation.statistics import pick_rows
from hcsmoe_hub.observation.watcher import Observation


def scale_outputs(
    layer: LayerContext, changed: Mapping[str, Tensor], *, clusters: Clusters, seen: Observation, fitted: Observation
) -> bool:
    """Scales the outputs of every merged expert, in place where that brings the block nearer to the original one.

    An expert k is multiplied by ``sum_t w_tk W_tk / sum_t w_tk^2`` over evenly spaced tokens, with the weight ``w_tk``
    that the reduced router gives it and the sum ``W_tk`` of those that the source's router gave its members.

    Args:
        layer: The layer; of experts whose output is proportional to their down projections and the router weight.
        changed: Tensors of its block in the result, by parameter name; those of the experts are written to.
        clusters: Its groups of experts.
        seen: Inputs of the block in the source.
        fitted: Inputs of the same tokens in the result and the outputs wanted there; often the same.

    Returns:
        Whether the scales were kept.
    """
    count = len(clusters.members)
    wanted_TC = routed_tokens(layer.source, seen.calls).weights(torch.tensor(clusters.labels), count)
    before, reduced_TC = _run(layer, changed, fitted, count)
    sums = torch.stack([reduced_TC.square().sum(0), (reduced_TC * wanted_TC.to(reduced_TC.device)).sum(0)])
    size_C, product_C = added_up(sums, layer.device)
    factor_C = torch.where(size_C > 0, product_C / size_C, 1)
    scaled = _scaled(layer, changed, factor_C)
    after, _ = _run(layer, dict(changed) | scaled, fitted, count)
    is_kept = after < before
    if is_kept:
        for name, tensor in scaled.items():
            changed[name].copy_(tensor)
    return is_kept


def _run(layer: LayerContext, changed: Mapping[str, Tensor], fitted: Observation, count: int) -> tuple[float, Tensor]:
    """Error of a reduced block on evenly spaced tokens, and the router weight of each expert, ``[T, C]``."""
    calls = even_calls(layer.source, fitted.calls)
    with layer.reduced(changed) as reduced:
        weight_TC = routed_tokens(reduced, fitted.calls).weights(torch.arange(count), count)
        outputs = reduced.rerun(calls, RoutedObserver).outputs
    wanted = fitted.outputs
    if layer.source.runs_on_tokens(fitted.calls):
        wanted = [pick_rows(wanted, own_even_tokens(sum(map(len, wanted)), layer.device))]
    return shared_error(wanted, outputs), weight_TC


def _scaled(layer: LayerContext, changed: Mapping[str, Tensor], factor_C: Tensor) -> dict[str, Tensor]:
    """Copies of what experts add to the output, multiplied by a factor each, by parameter name."""
    block = layer.shape.block(layer.block)
    tensors = {block.name_in_experts(tensor): (tensor, changed[tensor.name].clone()) for tensor in block.experts}
    rows = {name: tensor.split(values)[0] for name, (tensor, values) in tensors.items()}
    neurons = layer.source.experts.neurons(rows)
    for values_C in (*neurons.outputs, *neurons.others):
        factors = factor_C.to(values_C.device).view(-1, *[1] * (values_C.dim() - 1))
        values_C.copy_(values_C.float() * factors)
    return {tensor.name: values for tensor, values in tensors.values()}
