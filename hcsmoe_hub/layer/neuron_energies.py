"""What every neuron of a layer adds to its output, and what it would add for the tokens of other experts.

E source experts, U experts that differ from each other, T tokens, K experts per token, R inputs of experts, H hidden
size, I expert intermediate size.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.layer.weights import BlockWeights
from hcsmoe_hub.machine import ranks
from hcsmoe_hub.machine.smaller_pieces import and_host, first_that_fits, halves
from hcsmoe_hub.methods.clustering import NeuronEnergies
from hcsmoe_hub.methods.clustering.energies import ENERGY_CHUNK, ENERGY_TOKENS
from hcsmoe_hub.methods.merging import find_copies
from hcsmoe_hub.methods.merging.narrowing import magnitudes
from hcsmoe_hub.methods.merging.neurons import Neurons
from hcsmoe_hub.methods.refit.held_out import OwnTokens
from hcsmoe_hub.model.experts import Experts
from hcsmoe_hub.observation.observers import InputObserver
from hcsmoe_hub.observation.runnable_block import RunnableBlock
from hcsmoe_hub.observation.statistics import Call, count_tokens, pick_tokens, spaced
from hcsmoe_hub.observation.watcher import Observation

# Fewest tokens that are processed at once.
LEAST_ROWS = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutedTokens:
    """Evenly spaced tokens of one block that this rank holds, and what its router decided; on one device.

    Attributes:
        tokens_TH: What goes into the experts.
        index_TK: Chosen experts, int64; -1 for none.
        weight_TK: Router weights of the choices.
    """

    tokens_TH: Tensor
    index_TK: Tensor
    weight_TK: Tensor

    def weights(self, places: Tensor, count: int) -> Tensor:
        """Router weight that every group of experts gets: ``[T, count]`` float32.

        Args:
            places: Group of every expert, ``[E]`` int64; -1 for none.
            count: Number of groups.
        """
        place_TK = places.to(self.index_TK.device)[self.index_TK.clamp(min=0)]
        is_counted_TK = (self.index_TK >= 0) & (place_TK >= 0)
        weight_TK = torch.where(is_counted_TK, self.weight_TK, 0).float()
        return weight_TK.new_zeros(len(weight_TK), count).scatter_add_(1, place_TK.clamp(min=0), weight_TK)


def even_tokens(total: int) -> Tensor:
    """Numbers of at most ``ENERGY_TOKENS`` of some tokens, at even distances: int64."""
    return spaced(torch.arange(total), ENERGY_TOKENS)


def own_even_tokens(count: int, device: torch.device) -> Tensor:
    """Which of the evenly spaced tokens of all ranks are among the tokens of this one: int64.

    Args:
        count: Tokens of this rank; their numbers begin at 0.
        device: Through which ranks find out about each other.
    """
    own = OwnTokens.of(count, device)
    return own.part(even_tokens(own.total))


def even_calls(block: RunnableBlock, calls: list[Call]) -> list[Call]:
    """Inputs of a block for evenly spaced tokens; all inputs where a block cannot run on single tokens."""
    if not block.runs_on_tokens(calls):
        return calls
    return [pick_tokens(calls, own_even_tokens(count_tokens(calls), block.device))]


def routed_tokens(block: RunnableBlock, calls: list[Call]) -> RoutedTokens:
    """Runs the router of a block on evenly spaced tokens.

    Args:
        block: The block of the source or of the result.
        calls: Its inputs.
    """
    observer = block.rerun(even_calls(block, calls), InputObserver)
    tokens_TH = torch.cat(observer.tokens)
    count, is_even = len(tokens_TH), block.runs_on_tokens(calls)
    even = (even_tokens(count) if is_even else own_even_tokens(count, block.device)).to(tokens_TH.device)
    return RoutedTokens(
        tokens_TH=tokens_TH[even],
        index_TK=torch.cat(observer.top_k).to(tokens_TH.device)[even].long(),
        weight_TK=torch.cat(observer.weights).to(tokens_TH.device)[even],
    )


def collect_energies(
    layer: LayerContext,
    weights: BlockWeights,
    seen: Observation,
    *,
    named: Set[int] = frozenset(),
    for_widths: bool = False,
) -> NeuronEnergies:
    """Runs every expert on evenly spaced tokens of a layer, and measures its neurons.

    Args:
        layer: The layer; the weights of its block in the source are in memory.
        weights: Its experts.
        seen: What was observed of it.
        named: Experts whose own neurons are asked for. If one of them is a copy of an expert before it, whose neurons
            may have another order, all experts count as different.
        for_widths: Whether neurons are chosen for other widths than that of the result as well.
    """
    neurons = layer.source.experts.neurons(weights.experts)
    place_E = find_copies(neurons)
    if any(place_E.index(place_E[expert]) != expert for expert in named):
        place_E = tuple(range(neurons.count))
    routed = routed_tokens(layer.source, seen.calls)
    energies = energies_on(routed, layer.source.experts, neurons, place_E, device=layer.device)
    if layer.shape.width == neurons.size and not for_widths:
        return energies
    magnitude_EI = magnitudes(neurons).to(energies.own_UI.device)
    return replace(energies, width=layer.shape.width, magnitude_UI=magnitude_EI[list(energies.first_U)])


def energies_on(
    routed: RoutedTokens,
    experts: Experts,
    neurons: Neurons,
    place_E: tuple[int, ...],
    *,
    device: torch.device | None = None,
) -> NeuronEnergies:
    """Energies of all neurons on some tokens of all ranks.

    Where the router weight multiplies an expert's input, the activations are those on the weighted input, and every
    choice of a token is an input of its own. Where a norm follows the experts, energies are those before it. Where
    memory runs out, fewer tokens are processed at a time, and in the end the sums are held on the host.

    Args:
        routed: The tokens.
        experts: How the experts compute.
        neurons: Their tensors.
        place_E: Their numbers from ``find_copies``.
        device: Where the experts run; where their tensors are by default.
    """
    firsts = [place_E.index(place) for place in range(max(place_E) + 1)]
    (outputs_EIH,) = neurons.outputs
    device = outputs_EIH.device if device is None else device
    sizes = [outputs_EIH[expert].float().square().sum(-1).to(device) for expert in firsts]

    def attempt(way: tuple[int, torch.device]) -> tuple[Tensor, Tensor]:
        rows, home = way
        own_UI = torch.zeros(len(firsts), neurons.size, device=home)
        harm_UUI = torch.zeros(len(firsts), *own_UI.shape, device=home)
        for inputs_RH, weight_RU, is_chosen_RU in routed_inputs(routed, place_E, scales_input=experts.scales_input):
            for start in range(0, len(inputs_RH), rows):
                chunk = slice(start, start + rows)
                inputs = inputs_RH[chunk].to(device)
                square_RU = weight_RU[chunk].to(device).square()
                is_free_RU = ~is_chosen_RU[chunk].to(device)
                for place, expert in enumerate(firsts):
                    with torch.no_grad():
                        energy_RI = experts.hidden(expert, inputs).float().square_().mul_(sizes[place])
                    own_UI[place] += (square_RU[:, place] @ energy_RI).to(home)
                    harm_UUI[:, place] += ((square_RU * is_free_RU[:, place, None]).T @ energy_RI).to(home)
        return own_UI, harm_UUI

    rows = list(halves(max(1, ENERGY_CHUNK // neurons.size), LEAST_ROWS))
    ways = [(count, device) for count in rows] + [(rows[-1], home) for home in and_host(device)[1:]]
    own_UI, harm_UUI = first_that_fits(attempt, ways, device)
    return NeuronEnergies.of(added_up(own_UI, device), added_up(harm_UUI, device), place_E)


def added_up(sums: Tensor, device: torch.device) -> Tensor:
    """Sums over all ranks, which meet on a device wherever a rank holds its own."""
    return ranks.add_up(sums.to(device)).to(sums.device) if ranks.is_shared() else sums


def routed_inputs(
    routed: RoutedTokens, place_E: tuple[int, ...], *, scales_input: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What groups of experts are given.

    Args:
        routed: The tokens.
        place_E: Group of every expert; -1 for none.
        scales_input: Whether the router weight multiplies the input of an expert.

    Yields:
        Inputs of the experts ``[R, H]``, what weighs their outputs ``[R, U]``, and who is wanted there ``[R, U]``.
    """
    places, count = torch.tensor(place_E, device=routed.index_TK.device), max(place_E) + 1
    weight_TU = routed.weights(places, count)
    is_chosen_TU = weight_TU != 0
    if not scales_input:
        yield routed.tokens_TH, weight_TU, is_chosen_TU
        return
    # One choice of every token at a time: each expert sees the token at another scale.
    for index_T, weight_T in zip(routed.index_TK.T, routed.weight_TK.T, strict=True):
        token = torch.where((index_T >= 0) & (places[index_T.clamp(min=0)] >= 0))[0]
        inputs_RH = routed.tokens_TH[token] * weight_T[token, None].to(routed.tokens_TH.dtype)
        weight_RU = torch.nn.functional.one_hot(places[index_T[token]], count).float()
        yield inputs_RH, weight_RU, is_chosen_TU[token]
