"""Where the neurons come from that the experts of a result are made of: recorded, or given by another conversion.

C experts of the result, I neurons of each, or W where experts are narrower than those of the source.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hcsmoe_hub.methods.clustering.energies import NeuronEnergies

# Of one source expert: its number, the numbers of its neurons [P] int64, and the scales of their outputs [P] float32.
Part = tuple[int, Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NeuronOrigins:
    """Which neurons of the source the experts of one layer are made of.

    Attributes:
        expert_CI: Source expert of every neuron, ``[C, I]``, in the smallest unsigned integers that hold it.
        neuron_CI: Its number in that expert, the same.
    """

    expert_CI: NDArray[Any]
    neuron_CI: NDArray[Any]

    @classmethod
    def of(cls, clusters: Sequence[Sequence[Part]]) -> Self:
        """The origins of a layer's experts, each of them made of the given parts of source experts."""
        experts = [[expert for expert, neuron_P, _ in parts for _ in range(len(neuron_P))] for parts in clusters]
        neurons = [torch.cat([neuron_P for _, neuron_P, _ in parts]).tolist() for parts in clusters]
        return cls(expert_CI=smallest(experts), neuron_CI=smallest(neurons))

    @classmethod
    def within(cls, experts: Sequence[int], neuron_CW: Tensor) -> Self:
        """The origins of experts that each have neurons of one source expert."""
        parts = (
            [(expert, neuron_W, torch.ones(len(neuron_W)))] for expert, neuron_W in zip(experts, neuron_CW, strict=True)
        )
        return cls.of(list(parts))

    def neurons(self) -> Tensor:
        """The numbers of the neurons, ``[C, I]`` int64."""
        return torch.from_numpy(self.neuron_CI.astype(np.int64))

    @property
    def experts(self) -> frozenset[int]:
        """The source experts that any neuron comes from."""
        return frozenset(np.unique(self.expert_CI).tolist())

    def parts(self, number: int, energies: NeuronEnergies, members: Sequence[int]) -> Iterator[Part]:
        """The neurons of one expert as ``best_neurons`` returns those that it chooses.

        Args:
            number: Number of the expert in the result.
            energies: Of the layer's neurons, by which they are scaled.
            members: The source experts that it stands for.
        """
        expert_I = torch.from_numpy(self.expert_CI[number].astype(np.int64))
        neuron_I = self.neurons()[number]
        places = list(dict.fromkeys(energies.place_E[expert] for expert in members))
        gain_MI, scale_MI = energies.kept(places)
        if not gain_MI.any():
            scale_MI = torch.ones_like(scale_MI)
        for expert in dict.fromkeys(expert_I.tolist()):
            own = neuron_I[expert_I == expert]
            yield expert, own, scale_MI[places.index(energies.place_E[expert])].cpu()[own]


def smallest(numbers: Iterable[Sequence[int]]) -> NDArray[Any]:
    """Whole numbers in the smallest unsigned type that holds them, ``[C, I]``."""
    wide = np.asarray(list(numbers), dtype=np.int64)
    return wide.astype(np.min_scalar_type(int(wide.max(initial=0))))
