"""Permutations that bring the neurons of one expert into the order of another.

I neurons of each expert.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hcsmoe_hub.methods.merging.neuron_features import (
    MIN_INPUTS,
    Describe,
    HiddenSample,
    hidden_of,
    products,
    standardise,
    weight_columns,
)
from hcsmoe_hub.methods.merging.neurons import Neurons
from hcsmoe_hub.options import Align


def match_neurons(similarity_II: Tensor) -> Tensor:
    """The one-to-one matching of the greatest total similarity (a linear assignment problem).

    Takes time in proportion to I^3 at worst and 24 I^2 bytes. On one core, for two noisy copies of an expert: 0.8 s for
    I = 4096, 30 s and 4.3 GB for I = 14336; for unrelated experts: 4.6 s for I = 4096.

    Args:
        similarity_II: ``[I, I]``; rows are neurons of the anchor, columns those of the other expert.

    Returns:
        ``[I]`` int64 on the host: neuron ``order[i]`` of the other expert belongs to neuron i
        of the anchor.
    """
    # Copied as they are: numbers of twice the size are made on the host.
    _, order = linear_sum_assignment(similarity_II.cpu().double().numpy(), maximize=True)
    return torch.from_numpy(order).to(torch.int64)


def alignment_features(
    neurons: Neurons, members: tuple[int, ...], align: Align, sample: HiddenSample | None
) -> tuple[Describe, bool]:
    """Features whose products are the similarities that alignment maximises.

    ``weight``: the product of all weights of two neurons, so that the matching maximises
    ``<gate, P gate'> + <up, P up'> + <down, down' P^T>`` (M-SMoE, section 3.1, after Git Re-Basin, for experts of three
    matrices; biases count as further weights). ``activation``: the correlation of hidden activations on the same
    tokens, all of them, wherever they are routed.

    Args:
        neurons: The members of one cluster.
        members: Their numbers in the layer.
        align: What to compare by.
        sample: Source of activations.

    Returns:
        The features of each member; and whether they are those asked for. Without two tokens there are no activations
        to correlate, and weights stand in for them.
    """
    inputs_TH = sample.all_inputs() if sample else torch.empty(0, 0)
    has_inputs = len(inputs_TH) >= MIN_INPUTS

    def by_activation(position: int) -> Tensor:
        assert sample is not None
        return standardise(hidden_of(sample, members[position], inputs_TH))

    def by_weight(position: int) -> Tensor:
        return weight_columns(neurons, position)

    match align:
        case Align.ACTIVATION:
            return (by_activation if has_inputs else by_weight), has_inputs
        case Align.WEIGHT:
            return by_weight, True
        case Align.NONE:
            raise ValueError("nothing to align by")


def align_neurons(neurons: Neurons, describe: Describe, anchor: int) -> None:
    """Reorders the neurons of every other member to match those of the anchor, in place.

    What each expert computes stays as it is; only weighted sums of experts change.

    Args:
        neurons: The members of one cluster.
        describe: Features of each member.
        anchor: Position of the expert whose order is kept.
    """
    anchor_RI = describe(anchor)
    others = [position for position in range(neurons.count) if position != anchor]
    orders = [match_neurons(products(anchor_RI, describe(position))) for position in others]
    if not orders:
        return
    # Together: each copy to a device is waited for.
    for position, order_I in zip(others, torch.stack(orders).to(neurons.outputs[0].device), strict=True):
        neurons.permute(position, order_I)
