"""Merged experts that are made of whole neurons: the best ones of all members of a cluster, nothing averaged."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hcsmoe_hub.methods.clustering.energies import NeuronEnergies
from hcsmoe_hub.methods.merging.narrowing import GUARDED, best
from hcsmoe_hub.methods.merging.neuron_origins import Part
from hcsmoe_hub.methods.merging.neurons import Neurons, NeuronView


def is_one_expert(energies: NeuronEnergies, members: Sequence[int]) -> bool:
    """Whether all members of a cluster compute the same."""
    return len({energies.place_E[expert] for expert in members}) == 1


def best_neurons(energies: NeuronEnergies, members: Sequence[int]) -> Iterator[Part]:
    """The W neurons of greatest gain of all members of a cluster; among equals those of the lowest numbers.

    Where W is less than I, a few outliers stay in any case, and magnitude decides among equals.

    Args:
        energies: Of the layer's neurons.
        members: Source experts.

    Returns:
        For every expert that keeps any: its number, its neurons ``[P]`` int64 in ascending order, and the scales of
        what they add to the output, ``[P]`` float32. Copies of an expert count once. Where no token reached any
        member, the neurons of the first one, unscaled.
    """
    places = list(dict.fromkeys(energies.place_E[expert] for expert in members))
    gain_MI, scale_MI = energies.kept(places)
    neurons = gain_MI.shape[1]
    if not gain_MI.any():
        scale_MI = torch.ones_like(scale_MI)
    if energies.width < neurons:
        magnitude_N = energies.magnitude_UI[places].flatten()
        best_W = best(gain_MI.flatten(), magnitude_N, energies.width, guarded=max(1, neurons // GUARDED))
    else:
        best_W = gain_MI.flatten().sort(descending=True, stable=True).indices[:neurons].sort().values
    # Together: looking for each member's neurons on a device would wait for it every time.
    best_W, scale_MI = best_W.cpu(), scale_MI.cpu()
    firsts = energies.first_U
    for number, place in enumerate(places):
        own = best_W[best_W // neurons == number] - number * neurons
        if len(own):
            yield firsts[place], own, scale_MI[number, own]


def write_neurons(rows: Mapping[str, Tensor], view: NeuronView, parts: Iterable[Part], *, target: Neurons) -> None:
    """Writes neurons of several source experts into one expert; one of them is read at a time.

    Args:
        rows: Tensors of all source experts by name, ``[E, ...]``.
        view: Looks at such tensors neuron by neuron.
        parts: The neurons, as ``best_neurons`` returns them.
        target: The expert ``[1, ...]``; what belongs to no neuron is not written.
    """
    experts, neurons, scales = zip(*parts, strict=True)
    device, sizes = target.outputs[0].device, [len(neuron_P) for neuron_P in neurons]
    # Together: each copy to a device is waited for.
    neurons, scales = (torch.cat(each).to(device).split(sizes) for each in (neurons, scales))
    start = 0
    for expert, neuron_P, scale_P in zip(experts, neurons, scales, strict=True):
        part = view({name: rows_E[expert, None] for name, rows_E in rows.items()})
        places = slice(start, start + len(neuron_P))
        for tensor, source in zip(target.inputs, part.inputs, strict=True):
            tensor[0, places] = source[0, neuron_P]
        for tensor, source in zip(target.outputs, part.outputs, strict=True):
            kept = source[0, neuron_P]
            wide = torch.promote_types(kept.dtype, torch.float32)
            tensor[0, places] = (kept.to(wide) * scale_P.to(wide)[:, None]).to(kept.dtype)
        start += len(neuron_P)
