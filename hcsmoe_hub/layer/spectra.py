"""Singular values of the experts of a layer, before and after they were merged.

E source experts, K experts of the result, R the smaller side of a matrix.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hcsmoe_hub.machine.smaller_pieces import and_host, first_that_fits
from hcsmoe_hub.methods.compress import singular_values, stable_rank
from hcsmoe_hub.methods.merging.neurons import NeuronView
from hcsmoe_hub.report import RankReport

# The matrices of an expert, in the order of ``Neurons``.
GATED, UNGATED = ("gate", "up", "down"), ("up", "down")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spectra:
    """Singular values of all experts of a layer.

    Attributes:
        before: Those of the source's experts, ``[E, R]`` float64 by the name of the matrix, the largest first.
        after: Those of the merged experts, ``[K, R]``.
    """

    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]

    @classmethod
    def of(cls, view: NeuronView, source: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> "Spectra":
        """Computes all of them.

        Args:
            view: Looks at such tensors neuron by neuron; see ``Experts.neurons``.
            source: Tensors of the source's experts, ``[E, ...]`` by name.
            merged: The same of the merged ones, ``[K, ...]``.
        """
        return cls(before=_values(view, source), after=_values(view, merged))

    def report(self) -> RankReport:
        """Stable ranks of all matrices."""
        return RankReport(before=_ranks(self.before), after=_ranks(self.after))


def _values(view: NeuronView, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Singular values of every matrix by its name."""
    neurons = view(rows)
    matrices = [*(tensor for tensor in neurons.inputs if tensor.dim() == 3), *neurons.outputs]
    names = GATED if len(matrices) == len(GATED) else UNGATED
    return {
        name: torch.stack([_singular_values(matrix) for matrix in experts])
        for name, experts in zip(names, matrices, strict=True)
    }


def _singular_values(matrix: Tensor) -> Tensor:
    """Those of one matrix, on the host; computed there where memory runs out."""
    return first_that_fits(
        lambda place: singular_values(matrix.to(place)).cpu(), and_host(matrix.device), matrix.device
    )


def _ranks(values: Mapping[str, Tensor]) -> dict[str, list[float]]:
    return {name: [stable_rank(values_R) for values_R in values_ER] for name, values_ER in values.items()}
