"""Features by which neurons of different experts are compared, and their correlations.

E experts of one cluster, I neurons of each, N = E I neurons, R inputs or other observations, H hidden size.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hcsmoe_hub.machine.smaller_pieces import and_host, first_that_fits, halves
from hcsmoe_hub.methods.merging.neurons import Neurons
from hcsmoe_hub.options import Features

# Position of an expert in its cluster -> features [R, I] float32 of its neurons; products of columns are similarities.
Describe = Callable[[int], Tensor]
# A correlation needs two observations.
MIN_INPUTS = 2
# Fewest inputs that an expert runs on at once where memory runs out.
LEAST_ROWS = 32


class HiddenSample(Protocol):
    """Source of hidden activations: those of every neuron on a sample of tokens."""

    def all_inputs(self) -> Tensor:
        """Every token, ``[T, H]``."""

    def routed_inputs(self, members: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs ``[R, H]`` of some experts, and ``[R]`` how many of them each goes to."""

    def hidden(self, expert: int, inputs_RH: Tensor) -> Tensor:
        """Hidden activation ``[R, I]`` of an expert, float32."""


def standardise(values_RI: Tensor, count_R: Tensor | None = None) -> Tensor:
    """Columns of mean 0 and norm 1, so that the product of two is their Pearson correlation.

    A column that does not vary becomes zero: its correlation with everything is 0.

    Args:
        values_RI: ``[R, I]``, one column per neuron.
        count_R: How often each row counts; once if ``None``.

    Returns:
        ``[R, I]`` float32; rows are scaled by the square root of their count.
    """

    def attempt(place: torch.device) -> Tensor:
        return _standardised(values_RI.to(place), None if count_R is None else count_R.to(place))

    return first_that_fits(attempt, and_host(values_RI.device), values_RI.device)


def _standardised(values_RI: Tensor, count_R: Tensor | None) -> Tensor:
    wide_RI = values_RI.double()
    count_R = torch.ones_like(wide_RI[:, 0]) if count_R is None else count_R.to(wide_RI)
    centred_RI = (wide_RI - count_R @ wide_RI / count_R.sum()) * count_R.sqrt()[:, None]
    is_constant_I = values_RI.amax(0) == values_RI.amin(0)
    centred_RI.masked_fill_(is_constant_I, 0)
    return (centred_RI / centred_RI.norm(dim=0).masked_fill(is_constant_I, 1)).float()


def hidden_of(sample: HiddenSample, expert: int, inputs_RH: Tensor) -> Tensor:
    """Hidden activation ``[R, I]`` of an expert, float32; collected on the host where memory runs out."""

    def attempt(rows: int) -> Tensor:
        if rows >= len(inputs_RH):
            return sample.hidden(expert, inputs_RH)
        return torch.cat([sample.hidden(expert, part_rH).cpu() for part_rH in inputs_RH.split(rows)])

    return first_that_fits(attempt, list(halves(max(1, len(inputs_RH)), LEAST_ROWS)), inputs_RH.device)


def products(one_RI: Tensor, other_RI: Tensor) -> Tensor:
    """Products of the columns of two features, ``[I, I]`` float32; on the host where memory runs out."""
    devices = [values.device for values in (one_RI, other_RI)]
    # Features that found no room on a device are on the host.
    device = next((each for each in devices if each.type == "cpu"), devices[0])

    def attempt(place: torch.device) -> Tensor:
        return one_RI.to(place).T @ other_RI.to(place)

    return first_that_fits(attempt, and_host(device), device)


def weight_columns(neurons: Neurons, expert: int) -> Tensor:
    """All weights of every neuron of one expert: its gate and up rows with their biases, and its down column.

    Returns:
        ``[R, I]`` float32, R = 3 H for gated experts without biases.
    """
    parts = [tensor[expert].float() for tensor in (*neurons.inputs, *neurons.outputs)]
    return torch.cat([part.T if part.dim() > 1 else part[None] for part in parts])


def correlation_features(
    neurons: Neurons, members: Sequence[int], features: Features, sample: HiddenSample | None
) -> tuple[Describe, bool]:
    """Features whose products are the correlations that fix-dom and ZipIt match neurons by.

    ``activation``: hidden activations (after the non-linearity, gate times up) on the tokens routed to any member, a
    token routed to two members counting twice. ``weight``: all weights of a neuron. ``activation+weight``: the sum of
    both correlations (HC-SMoE, appendix B.2).

    Args:
        neurons: The members of one cluster.
        members: Their numbers in the layer.
        features: What to compare by.
        sample: Source of activations.

    Returns:
        The features of each member; and whether they are those asked for. Without two routed tokens there are no
        activations to correlate, and weights stand in for them.
    """
    inputs_RH, count_R = sample.routed_inputs(members) if sample else (torch.empty(0, 0), torch.empty(0))
    has_inputs = len(inputs_RH) >= MIN_INPUTS

    def by_activation(position: int) -> Tensor:
        assert sample is not None
        return standardise(hidden_of(sample, members[position], inputs_RH), count_R)

    def by_weight(position: int) -> Tensor:
        return standardise(weight_columns(neurons, position))

    def by_both(position: int) -> Tensor:
        # Below each other: the product of two columns is then the sum of both correlations.
        activation_RI = by_activation(position)
        return torch.cat([activation_RI, by_weight(position).to(activation_RI.device)])

    match features:
        case Features.WEIGHT:
            return by_weight, True
        case Features.ACTIVATION:
            return (by_activation if has_inputs else by_weight), has_inputs
        case Features.ACTIVATION_WEIGHT:
            return (by_both if has_inputs else by_weight), has_inputs


def correlations(describe: Describe, experts: int) -> Tensor:
    """Correlations of all neurons of all members with each other.

    Args:
        describe: Features of each member.
        experts: Number of members, E.

    Returns:
        ``[N, N]`` float32 on the host, exactly symmetric; 4 N^2 bytes, which is what limits the size of a cluster.
    """
    features = [describe(position) for position in range(experts)]
    size = features[0].shape[1]
    matrix_NN = torch.empty(experts * size, experts * size)
    blocks = matrix_NN.unflatten(0, (experts, size)).unflatten(2, (experts, size))
    for row in range(experts):
        for column in range(row, experts):
            block_II = products(features[row], features[column]).cpu()
            if row == column:
                # A matrix product need not round both halves alike, and ties are broken by equality.
                block_II = block_II.triu() + block_II.triu(1).T
            blocks[row, :, column] = block_II
            blocks[column, :, row] = block_II.T
    return matrix_NN
