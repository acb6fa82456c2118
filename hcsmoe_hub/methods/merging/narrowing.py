"""Experts of fewer neurons: which ones stay, and the tensors that are left.

C experts, I neurons of each, W neurons of each in the result.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hcsmoe_hub.methods.merging.neurons import Neurons, NeuronView

# One in so many neurons stays for its magnitude alone: a few outliers carry what no average over tokens shows.
GUARDED = 256


def magnitudes(neurons: Neurons) -> Tensor:
    """Product of the lengths of what every neuron reads with and what it adds to the output: ``[C, I]`` float32."""
    sides = [_length(tensors) for tensors in (neurons.inputs, neurons.outputs)]
    return sides[0] * sides[1]


def _length(tensors: Sequence[Tensor]) -> Tensor:
    """Root of the sum of squares over all that belongs to a neuron, ``[C, I]`` float32."""
    total = torch.zeros(tensors[0].shape[:2], device=tensors[0].device)
    for tensor in tensors:
        # One expert at a time: float32 copies of all would be as large as the layer.
        for expert, values in enumerate(tensor):
            total[expert] += values.float().square().reshape(len(values), -1).sum(1)
    return total.sqrt()


def best(score_N: Tensor, magnitude_N: Tensor, width: int, *, guarded: int) -> Tensor:
    """Chooses neurons: those of greatest magnitude in any case, then those of greatest score.

    Args:
        score_N: What is lost without each neuron.
        magnitude_N: Decides among equal scores, and which neurons stay whatever their score.
        width: W.
        guarded: Number of neurons that stay for their magnitude.

    Returns:
        Their numbers, ``[W]`` int64 ascending; among equals the lower ones.
    """
    order_N = magnitude_N.sort(descending=True, stable=True).indices
    score_N = score_N[order_N].clone()
    score_N[: min(guarded, width)] = torch.inf
    chosen_W = score_N.sort(descending=True, stable=True).indices[:width]
    return order_N[chosen_W].sort().values


def best_of_experts(score_CI: Tensor, magnitude_CI: Tensor, width: int) -> Tensor:
    """Chooses the neurons that every expert keeps: ``[C, W]`` int64 ascending."""
    guarded = max(1, score_CI.shape[1] // GUARDED)
    pairs = zip(score_CI, magnitude_CI, strict=True)
    return torch.stack([best(score_I, magnitude_I, width, guarded=guarded) for score_I, magnitude_I in pairs])


def narrow(
    rows: Mapping[str, Tensor], view: NeuronView, kept_CW: Tensor, shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Experts with some of their neurons.

    Args:
        rows: Tensors of the experts by name, ``[C, ...]``; not changed.
        view: Looks at such tensors neuron by neuron.
        kept_CW: Neurons that every expert keeps.
        shapes: Shape of one narrower expert in every tensor.
    """
    narrower = {name: tensor.new_empty((len(tensor), *shapes[name])) for name, tensor in rows.items()}
    source, target = view(rows), view(narrower)
    for places, values in zip((*target.inputs, *target.outputs), (*source.inputs, *source.outputs), strict=True):
        for expert, kept_W in enumerate(kept_CW.to(values.device)):
            places[expert] = values[expert, kept_W]
    for places, values in zip(target.others, source.others, strict=True):
        places.copy_(values)
    return narrower
