"""Experts, neuron by neuron.

E experts, I neurons of each (the expert intermediate size), H hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Names and tensors [E, ...] of one layer's experts -> the same memory, neuron by neuron.
NeuronView = Callable[[Mapping[str, Tensor]], "Neurons"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Neurons:
    """Tensors of one layer's experts, turned so that their second dimension counts neurons.

    An expert is a sum over its neurons: each computes one number from the token and adds a multiple of one vector to
    the output. The order of the neurons is therefore free, as long as all tensors here follow it.

    Attributes:
        inputs: What each neuron computes its number with, ``[E, I, H]`` or ``[E, I]``: gate, up and their biases.
        outputs: What each neuron adds to the output, ``[E, I, H]``: down.
        others: What belongs to the expert as a whole, ``[E, ...]``: the bias of down.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    others: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """I, the number of neurons of one expert."""
        return self.outputs[0].shape[1]

    @property
    def count(self) -> int:
        """E, the number of experts."""
        return self.outputs[0].shape[0]

    def permute(self, expert: int, order_I: Tensor) -> None:
        """Reorders the neurons of one expert in place, which leaves what it computes unchanged.

        Args:
            expert: Number of the expert.
            order_I: int64; neuron ``order_I[i]`` moves to place i.
        """
        for tensor in (*self.inputs, *self.outputs):
            tensor[expert] = tensor[expert, order_I]

    def average(self, group_N: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Means of groups of neurons of all experts together.

        Args:
            group_N: ``[E * I]`` int64: group of every neuron, expert by expert; each of 0 to I - 1 occurs.

        Returns:
            Merged inputs and outputs of one expert, ``[I, H]`` or ``[I]``, float32 or wider.
        """
        return _group_means(self.inputs, group_N, self.size), _group_means(self.outputs, group_N, self.size)


def _group_means(tensors: Sequence[Tensor], group_N: Tensor, groups: int) -> list[Tensor]:
    """Mean of every group, tensor by tensor, added up in ascending order on every device."""
    order_N = group_N.argsort(stable=True)
    count_G = torch.bincount(group_N, minlength=groups)
    first_G = count_G.cumsum(0) - count_G
    # Groups with more than k members are the first ones of this order; a device is waited for once, to know how many.
    largest_G = count_G.argsort(descending=True)
    left = count_G.bincount().flip(0).cumsum(0).flip(0)[1:].tolist()
    means = []
    for tensor in tensors:
        wide = torch.promote_types(tensor.dtype, torch.float32)
        total = tensor.new_zeros((groups, *tensor.shape[2:]), dtype=wide)
        # The k-th members of all groups at once: no group occurs twice, so the order of additions is fixed.
        for rank, number in enumerate(left):
            group = largest_G[:number]
            neuron = order_N[first_G[group] + rank]
            total[group] += tensor[neuron // tensor.shape[1], neuron % tensor.shape[1]].to(wide)
        means.append(total / count_G.view(-1, *[1] * (tensor.dim() - 2)))
    return means
