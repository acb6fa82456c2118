"""What the neurons of one layer's experts add to its output, and what they would add where they are not wanted.

E source experts, U experts that differ from each other, I neurons of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

# More tokens change the energies little; of more, as many are taken at even distances.
ENERGY_TOKENS = 8192
# Hidden activations of one expert that are in memory at once: 64 MB in float32.
ENERGY_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NeuronEnergies:
    """Output energies of neurons on calibration tokens.

    With the router weight ``W_te`` of token t for expert e (0 where it was not chosen), the hidden activation
    ``a_ej(x_t)`` of its neuron j and the column ``d_ej`` of its down projection::

        own[e, j]     = sum_t W_te^2 a_ej(x_t)^2 ||d_ej||^2    where e was chosen
        harm[m, e, j] = sum_t W_tm^2 a_ej(x_t)^2 ||d_ej||^2    where m was chosen and e was not

    Experts that compute the same, whatever the order of their neurons, count as one expert, whose weight is the sum of
    theirs.

    Attributes:
        own_UI: Energy of every neuron where its expert was chosen, float32.
        harm_UUI: Energy of the neurons of expert ``[:, e]`` where expert ``[m]`` was chosen instead, float32.
        place_E: Number among the U of every source expert.
        magnitude_UI: Product of the lengths of both sides of every neuron, float32.
        width: W, the neurons that an expert of the result is made of: I, or fewer.
        total: Output energy of all neurons of the layer, which losses are shares of; 1 if no neuron has any.
    """

    own_UI: Tensor
    harm_UUI: Tensor
    place_E: tuple[int, ...]
    magnitude_UI: Tensor
    width: int
    total: float

    @classmethod
    def of(
        cls, own_UI: Tensor, harm_UUI: Tensor, place_E: Sequence[int], *, magnitude_UI: Tensor | None = None
    ) -> Self:
        """The energies of all experts of a layer, whose merged experts are as wide; without magnitudes, all alike."""
        total = float(own_UI.sum(dtype=torch.float64)) or 1.0
        return cls(
            own_UI=own_UI,
            harm_UUI=harm_UUI,
            place_E=tuple(place_E),
            magnitude_UI=torch.ones_like(own_UI) if magnitude_UI is None else magnitude_UI,
            width=own_UI.shape[1],
            total=total,
        )

    @property
    def first_U(self) -> tuple[int, ...]:
        """The source expert in whose order the neurons of each of the U experts are listed: its first copy."""
        return tuple(self.place_E.index(place) for place in range(max(self.place_E) + 1))

    def on(self, device: torch.device) -> Self:
        """The same on a device."""
        tables = (self.own_UI, self.harm_UUI, self.magnitude_UI)
        own_UI, harm_UUI, magnitude_UI = (values.to(device) for values in tables)
        return replace(self, own_UI=own_UI, harm_UUI=harm_UUI, magnitude_UI=magnitude_UI)

    def part(self, experts: Sequence[int]) -> Self:
        """The same among some of the source experts only, numbered anew in the given order."""
        places = list(dict.fromkeys(self.place_E[expert] for expert in experts))
        chosen = torch.tensor(places, device=self.own_UI.device)
        return type(self)(
            own_UI=self.own_UI[chosen],
            harm_UUI=self.harm_UUI[chosen[:, None], chosen],
            place_E=tuple(places.index(self.place_E[expert]) for expert in experts),
            magnitude_UI=self.magnitude_UI[chosen],
            width=self.width,
            total=self.total,
        )

    def kept(self, members: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What an expert made of some source experts gains by each of their neurons, and the best scale of each.

        A neuron that is kept with scale s misses ``(1 - s)^2 own`` where it is wanted and adds ``s^2 harm`` where it is
        not; the sum is least for ``s = own / (own + harm)``, and lower than without the neuron by ``s own``.

        Args:
            members: Numbers among the U experts.

        Returns:
            Gains and scales, ``[M, I]`` float32. A neuron that harms no other member has a scale of 1.
        """
        chosen = torch.tensor(list(members), device=self.own_UI.device)
        own_MI = self.own_UI[chosen]
        harm_MI = self.harm_UUI[chosen[:, None], chosen].sum(0)
        scale_MI = torch.where(harm_MI > 0, own_MI / (own_MI + harm_MI), 1)
        return gains(own_MI, harm_MI), scale_MI


def gains(own: Tensor, harm: Tensor) -> Tensor:
    """``own^2 / (own + harm)``, 0 where both are; of tensors that can be broadcast together."""
    # A quotient first: squares of small energies would be zero.
    return (own + harm).clamp_(min=torch.finfo(own.dtype).tiny).reciprocal_().mul_(own).mul_(own)
