"""Which tensors a result has in each layout, and which of them a conversion changes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hcsmoe_hub.model.blocks import ExpertTensor
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.options import Layout
from hcsmoe_hub.planning.expert_shape import ExpertShape


def edited_names(model: SourceModel, layout: Layout) -> set[str]:
    """Names of the parameters and buffers that a conversion into a layout changes.

    The router, its biases and its tables follow the experts in the reduced and the factored layout, and are never
    touched in the others.
    """
    match layout:
        case Layout.REDUCED | Layout.FACTORED:
            return set().union(*(block.edited for block in model.blocks))
        case Layout.MAPPED | Layout.FULL:
            return {tensor.name for block in model.blocks for tensor in block.experts}


def result_state(
    model: SourceModel, experts_by_layer: Mapping[int, int], layout: Layout, shape: ExpertShape
) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of a result, by its name in the model.

    Args:
        model: The source, N experts.
        experts_by_layer: Experts ``K`` that each MoE layer keeps; a layer that is absent keeps all.
        layout: How they are written.
        shape: How wide they are.

    Returns:
        Meta tensors of the result's shapes, in the order of the source's: K experts and K router rows where the layout
        is reduced, K experts and N router rows where it is mapped, N of both where it is full. In the factored layout
        they are those of the reduced one: what is in memory before the matrices of the experts become factors.
    """
    state = dict(model.skeleton.state)
    for block in model.blocks:
        match layout:
            case Layout.REDUCED | Layout.FACTORED:
                sized: tuple[ExpertTensor, ...] = (*block.experts, *block.router)
            case Layout.MAPPED:
                sized = block.experts
            case Layout.FULL:
                sized = ()
        for tensor in sized:
            state[tensor.name] = _resized(state[tensor.name], tensor, experts_by_layer.get(block.layer))
    if shape.narrowed is not None:
        for name, tensor in shape.narrowed.tensors.items():
            state[name] = _narrowed(state[name], tensor.dim, shape.narrowed.size, shape.width)
    return state


def _narrowed(tensor: Tensor, dim: int, neurons: int, width: int) -> Tensor:
    sizes = list(tensor.shape)
    # Several entries per neuron, or neurons of all experts, can lie along one dimension.
    sizes[dim] = sizes[dim] // neurons * width
    return torch.empty(sizes, dtype=tensor.dtype, device="meta")


def _resized(source: Tensor, tensor: ExpertTensor, experts: int | None) -> Tensor:
    if experts is None:
        return source
    shape = list(source.shape)
    shape[tensor.dim] = experts * tensor.rows_per_expert + tensor.extra_rows
    return torch.empty(shape, dtype=source.dtype, device="meta")
