"""Agglomerative clustering by what a merged expert of W neurons must lose.

E source experts, U experts that differ from each other, C clusters, I neurons of an expert, W of a merged one.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hcsmoe_hub.machine.smaller_pieces import and_host, first_that_fits
from hcsmoe_hub.methods.clustering.clusters import Grouping
from hcsmoe_hub.methods.clustering.energies import NeuronEnergies, gains
from hcsmoe_hub.methods.clustering.hierarchical import cut_tree

# Gains that are compared at once: 64 MB in float32.
CHUNK = 1 << 24


def loss_linkage(energies: NeuronEnergies, clusters: int) -> Grouping:
    """Groups experts so that the experts made of the best neurons of each group lose little.

    A cluster keeps the W neurons of greatest gain ``own^2 / (own + harm)`` of all its members and loses
    ``sum own - sum of these gains`` of the layer's output energy. Again and again the two clusters become one whose
    union adds least to that loss; among equals the pair with the lowest numbers. Copies of one expert come first, at
    no loss.

    Args:
        energies: Of the layer's neurons.
        clusters: K, between 1 and E.

    Returns:
        Exactly K clusters, and the tree of all E - 1 merges. Heights are what each merge adds to the loss, as a share
        of the output energy of all neurons, 0 to 1. A merge may cost less than the one before it, which it depends on;
        in the tree, where heights must not fall, it has the height of that one.
    """
    experts = len(energies.place_E)
    rows: list[tuple[int, int, float, int]] = []
    nodes: dict[int, int] = {}
    sizes = dict.fromkeys(range(experts), 1)

    def unite(left: int, right: int, height: float) -> int:
        node = experts + len(rows)
        sizes[node] = sizes[left] + sizes[right]
        rows.append((min(left, right), max(left, right), height, sizes[node]))
        return node

    for expert, place in enumerate(energies.place_E):
        nodes[place] = unite(nodes[place], expert, 0.0) if place in nodes else expert
    for first, second, added in loss_merges(energies):
        nodes[first] = unite(nodes[first], nodes.pop(second), added / energies.total)
    exact = np.array(rows, dtype=np.float64).reshape(-1, 4)
    tree = exact.copy()
    tree[:, 2] = np.maximum.accumulate(exact[:, 2])
    found = cut_tree(tree, clusters)
    heights = tuple(exact[: experts - clusters, 2].tolist())
    return replace(found, clusters=replace(found.clusters, heights=heights))


def loss_merges(energies: NeuronEnergies) -> list[tuple[int, int, float]]:
    """Unites clusters of the U experts that differ until one is left.

    Returns:
        The numbers of the two clusters of each of the U - 1 merges, the lower one first, which stays the number of the
        union; and what the merge adds to the loss, as an energy.
    """

    def attempt(place: torch.device) -> list[tuple[int, int, float]]:
        return _Agglomeration(energies.on(place)).merges()

    return first_that_fits(attempt, and_host(energies.own_UI.device), energies.own_UI.device)


def pair_losses(energies: NeuronEnergies) -> NDArray[np.float64]:
    """What uniting two experts would lose, as a share of the output energy of all neurons.

    Returns:
        Symmetric ``[E, E]`` float64 matrix with a zero diagonal, zero between copies.
    """
    device = energies.own_UI.device
    found_UU = first_that_fits(lambda place: _first_losses(energies.on(place)), and_host(device), device)
    losses_UU = found_UU / energies.total
    np.fill_diagonal(losses_UU, 0)
    places = np.array(energies.place_E)
    return losses_UU[np.ix_(places, places)]


def _first_losses(energies: NeuronEnergies) -> NDArray[np.float64]:
    """What uniting every pair of experts loses, ``[U, U]``, infinite on the diagonal; on the host."""
    own_UI, harm_UUI, experts = energies.own_UI, energies.harm_UUI, len(energies.own_UI)
    # What narrower experts keep when they are alone.
    energy_U = _largest(own_UI.clone(), energies.width)
    losses_UU = torch.full((experts, experts), torch.inf, dtype=torch.float64, device=own_UI.device)
    for first in range(experts - 1):
        others = slice(first + 1, None)
        both_P2I = [gains(own_UI[first], harm_UUI[others, first]), gains(own_UI[others], harm_UUI[first, others])]
        lost = energy_U[first] + energy_U[others] - _largest(torch.cat(both_P2I, dim=1), energies.width)
        losses_UU[first, others] = lost.clamp(min=0)
    found: NDArray[np.float64] = losses_UU.cpu().numpy()
    return np.minimum(found, found.T)


def _largest(values_PN: Tensor, count: int) -> Tensor:
    """Sum of the ``count`` largest values of every row, float64; on a CPU, rows may change their order."""
    if count == values_PN.shape[1]:
        return values_PN.sum(1, dtype=torch.float64)
    if values_PN.device.type != "cpu":
        return values_PN.topk(count, dim=1, sorted=False).values.sum(1, dtype=torch.float64)
    # On a CPU, NumPy finds them in a fifth of the time.
    start = values_PN.shape[1] - count
    ordered = values_PN.numpy()
    ordered.partition(start, axis=1)
    return torch.from_numpy(ordered[:, start:].sum(1, dtype=np.float64))


class _Agglomeration:
    """Clusters of experts, what each has lost, and what every union would add.

    A cluster has the number of its first expert.

    Args:
        energies: Of the layer's neurons.
    """

    def __init__(self, energies: NeuronEnergies) -> None:
        self._own_UI = energies.own_UI
        # Summed over the members of a cluster as they come together.
        self._harm_CUI = energies.harm_UUI.clone()
        self._width = energies.width
        self._energy_U = _largest(energies.own_UI.clone(), self._width).cpu().numpy()
        self._members = {expert: [expert] for expert in range(len(self._own_UI))}
        # The same where the energies are: a device would wait for every number that comes from the host.
        self._number_1 = torch.arange(len(self._own_UI), device=self._own_UI.device).split(1)
        self._inside_M = dict(enumerate(self._number_1))
        self._lost_C = np.zeros(len(self._own_UI))
        self._added_CC = _first_losses(energies)

    def merges(self) -> list[tuple[int, int, float]]:
        """Unites clusters until one is left: the two numbers, the lower one first, and what the union adds."""
        found = []
        while len(self._members) > 1:
            # The first of equals: the lowest numbers.
            first, second = (int(number) for number in np.unravel_index(self._added_CC.argmin(), self._added_CC.shape))
            found.append((first, second, float(self._added_CC[first, second])))
            self._unite(first, second)
        return found

    def _unite(self, first: int, second: int) -> None:
        self._lost_C[first] += self._lost_C[second] + self._added_CC[first, second]
        self._members[first] += self._members.pop(second)
        self._inside_M[first] = torch.cat([self._inside_M[first], self._inside_M.pop(second)])
        self._harm_CUI[first] += self._harm_CUI[second]
        self._added_CC[second] = self._added_CC[:, second] = np.inf
        others = [number for number in self._members if number != first]
        if others:
            lost = self._losses_with(first, others) - self._lost_C[first] - self._lost_C[others]
            self._added_CC[first, others] = self._added_CC[others, first] = np.maximum(lost, 0)

    def _losses_with(self, number: int, others: Sequence[int]) -> NDArray[np.float64]:
        """Loss of the union of one cluster with each of some others, ``[P]``."""
        by_size = defaultdict(list)
        for position, other in enumerate(others):
            by_size[len(self._members[other])].append(position)
        order, gained = [], []
        for size, positions in by_size.items():
            width = (len(self._members[number]) + size) * self._own_UI.shape[1]
            step = max(1, CHUNK // width)
            for start in range(0, len(positions), step):
                part = positions[start : start + step]
                gained.append(self._gains_with(number, [others[position] for position in part]))
                order += part
        energy = np.array([self._energy_U[self._members[other]].sum() for other in others])
        gained_P = np.empty(len(others))
        gained_P[order] = torch.cat(gained).cpu().numpy()
        return energy + self._energy_U[self._members[number]].sum() - gained_P

    def _gains_with(self, number: int, others: Sequence[int]) -> Tensor:
        """What the unions of one cluster with others, all of one size, keep of their energy: ``[P]`` float64."""
        inside_M = self._inside_M[number]
        other_P = torch.cat([self._number_1[other] for other in others])
        outside_PS = torch.stack([self._inside_M[other] for other in others])
        harm_MI = self._harm_CUI[number, inside_M]
        inside_PMI = self._harm_CUI[other_P[:, None], inside_M].add_(harm_MI)
        outside_PSI = self._harm_CUI[other_P[:, None], outside_PS] + self._harm_CUI[number, outside_PS]
        gained = [gains(self._own_UI[inside_M], inside_PMI), gains(self._own_UI[outside_PS], outside_PSI)]
        return _largest(torch.cat(gained, dim=1).flatten(1), self._width)
