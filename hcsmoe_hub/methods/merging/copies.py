"""Experts that compute the same, in whatever order of their neurons.

E experts, I neurons of each, H hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hcsmoe_hub.methods.merging.neurons import Neurons

# Sums over equal experts differ by rounding only; only such pairs are compared neuron by neuron. A share of the largest
# number, per neuron.
TOLERANCE = 1e-9


def find_copies(neurons: Neurons) -> tuple[int, ...]:
    """Numbers experts so that copies have the same number.

    Args:
        neurons: Of all experts.

    Returns:
        A number for every expert, by first appearance. Experts of the same number have the same neurons, bit for bit,
        and the same tensors that belong to no neuron.
    """
    tensors = (*neurons.inputs, *neurons.outputs)
    # Sums do not depend on the order of neurons, but for rounding.
    sum_EP = torch.stack([tensor.sum(dim=tuple(range(1, tensor.dim())), dtype=torch.float64) for tensor in tensors], 1)
    size_EP = torch.stack([tensor.abs().amax(dim=tuple(range(1, tensor.dim()))).double() for tensor in tensors], 1)
    # As a list, so that an accelerator is waited for once.
    is_near_EE = ((sum_EP[:, None] - sum_EP).abs() <= TOLERANCE * neurons.size * size_EP).all(-1).tolist()
    numbers: list[int] = []
    firsts: list[int] = []
    for expert in range(neurons.count):
        near = (number for number, first in enumerate(firsts) if is_near_EE[expert][first])
        found = next((number for number in near if _are_copies(neurons, firsts[number], expert)), None)
        if found is None:
            found = len(firsts)
            firsts.append(expert)
        numbers.append(found)
    return tuple(numbers)


def _are_copies(neurons: Neurons, first: int, second: int) -> bool:
    if not all(torch.equal(tensor[first], tensor[second]) for tensor in neurons.others):
        return False
    tensors = (*neurons.inputs, *neurons.outputs)
    orders = [_order(tensors, expert) for expert in (first, second)]
    return all(torch.equal(tensor[first, orders[0]], tensor[second, orders[1]]) for tensor in tensors)


def _order(tensors: Sequence[Tensor], expert: int) -> Tensor:
    """An order of one expert's neurons that depends on what they hold, not on where they are: ``[I]`` int64."""
    key_I = torch.zeros(tensors[0].shape[1], dtype=torch.float64, device=tensors[0].device)
    for tensor in tensors:
        values = tensor[expert].double().flatten(1) if tensor.dim() > 2 else tensor[expert].double()[:, None]
        direction = torch.linspace(0.5, 1.5, values.shape[1], dtype=torch.float64, device=values.device).sqrt()
        key_I += values @ direction
    return key_I.argsort()
