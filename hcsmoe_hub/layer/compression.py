"""Makes factors of the expert matrices of one layer, fitted to what reaches each expert.

K experts of the result, T tokens, H hidden size, I neurons, O outputs of a matrix.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hcsmoe_hub.checkpoint.modeling_hcsmoe_factored import INCOMING, OUTGOING, FactorSizes
from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.machine import ranks
from hcsmoe_hub.machine.smaller_pieces import and_host, first_that_fits, halves
from hcsmoe_hub.methods.compress import Decomposition, Whitening, decompose
from hcsmoe_hub.methods.merging.neurons import Neurons
from hcsmoe_hub.observation.observers import SampleObserver
from hcsmoe_hub.observation.runnable_block import RunnableBlock
from hcsmoe_hub.observation.watcher import Observation

# Tokens whose products are added up at a time, and the fewest where memory runs out.
GRAM_TOKENS = 16384
LEAST_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertInputs:
    """What one expert of a reduced block is given.

    Attributes:
        gram_HH: Sum of ``x x^T`` over the tokens that the router sends to it, float32.
        gram_II: The same of its hidden activations.
    """

    gram_HH: Tensor
    gram_II: Tensor


def compress_experts(
    layer: LayerContext, changed: Mapping[str, Tensor], sizes: FactorSizes, *, seen: Observation
) -> dict[str, Tensor]:
    """Splits every expert matrix of a reduced block into factors and rows.

    Each is decomposed by itself, for the inputs that it has on the tokens that the reduced router sends to its expert.

    Args:
        layer: The layer.
        changed: Tensors of its block in the result, by parameter name; the matrices are overwritten by what their parts
            add up to.
        sizes: Of the parts.
        seen: Inputs of the block.

    Returns:
        What is stored in place of the matrices, by parameter name; see ``FactoredExperts``.
    """
    neurons = _matrices(layer, changed)
    places = {
        INCOMING: [tensor_KIH for tensor_KIH in neurons.inputs if tensor_KIH.dim() == 3],
        # As the others: one row for each number that comes out.
        OUTGOING: [tensor_KIH.mT for tensor_KIH in neurons.outputs],
    }
    rows = {INCOMING: sizes.incoming_rows, OUTGOING: sizes.outgoing_rows}
    parts: dict[str, list[list[Decomposition]]] = {place: [] for place in places}
    for expert, inputs in enumerate(_inputs(layer, changed, neurons.count, seen)):
        grams = {INCOMING: Inputs(inputs.gram_HH), OUTGOING: Inputs(inputs.gram_II)}
        for place, matrices in places.items():
            found = []
            for matrix_KOI in matrices:
                weight_OI = matrix_KOI[expert]
                split = _decomposed(weight_OI, grams[place], layer.device, rank=sizes.rank, rows=rows[place])
                weight_OI.copy_(split.dense())
                found.append(split)
            parts[place].append(found)
    named: dict[str, Tensor] = {}
    for place, experts in parts.items():
        named |= {f"{place}_{name}": tensor for name, tensor in _stacked(experts).items()}
    return {layer.block.full_name(name): tensor for name, tensor in named.items()}


class Inputs:
    """The inputs of the matrices of one place, on a device or on the host.

    Args:
        gram_II: Sum of ``x x^T`` over them.
    """

    def __init__(self, gram_II: Tensor) -> None:
        self._gram_II = gram_II
        self._known: tuple[torch.device, Whitening] | None = None

    def on(self, device: torch.device) -> Whitening:
        """What is known of them; remembered for the next matrix."""
        if self._known is None or self._known[0] != device:
            self._known = device, Whitening(self._gram_II.to(device))
        return self._known[1]


def _decomposed(weight_OI: Tensor, inputs: Inputs, device: torch.device, *, rank: int, rows: int) -> Decomposition:
    """A matrix in parts, computed on a device, or on the host where memory runs out."""

    def attempt(place: torch.device) -> Decomposition:
        whitening = inputs.on(place)
        return decompose(weight_OI.to(place), whitening, rank=rank, rows=rows, dtype=weight_OI.dtype)

    return first_that_fits(attempt, and_host(device), device)


def _matrices(layer: LayerContext, changed: Mapping[str, Tensor]) -> Neurons:
    """Views of the experts of a block in the result."""
    block = layer.block
    rows = {block.name_in_experts(tensor): tensor.split(changed[tensor.name])[0] for tensor in block.experts}
    return layer.source.experts.neurons(rows)


def _inputs(
    layer: LayerContext, changed: Mapping[str, Tensor], experts: int, seen: Observation
) -> Iterator[ExpertInputs]:
    """Gram matrices of what each expert of a reduced block is given, one expert after the other."""
    with layer.reduced(changed) as reduced, torch.no_grad():
        observer = reduced.rerun(seen.calls, SampleObserver)
        tokens_TH = torch.cat(observer.tokens)
        index_TK = torch.cat(observer.top_k).to(layer.device)
        for expert in range(experts):
            yield _inputs_of(reduced, expert, tokens_TH[(index_TK == expert).any(1)])


def _inputs_of(block: RunnableBlock, expert: int, tokens_NH: Tensor) -> ExpertInputs:
    def attempt(most: int) -> list[Tensor]:
        # An empty part where no token is routed to the expert, for matrices of zeros.
        parts = tokens_NH.split(most) if len(tokens_NH) else (tokens_NH,)
        grams = [_gram(part) for part in (parts[0], block.experts.hidden(expert, parts[0]))]
        for part_NH in parts[1:]:
            for place, values in enumerate((part_NH, block.experts.hidden(expert, part_NH))):
                grams[place] = _gram(values) + grams[place]
        return grams

    first, second = first_that_fits(attempt, list(halves(GRAM_TOKENS, LEAST_TOKENS)), block.device)
    return ExpertInputs(gram_HH=ranks.add_up(first), gram_II=ranks.add_up(second))


def _gram(values: Tensor) -> Tensor:
    """Products of the columns of a matrix with each other, float32."""
    wide = values.float()
    return wide.T @ wide


def _stacked(experts: list[list[Decomposition]]) -> dict[str, Tensor]:
    """Parts of all matrices of a place, ``[K, M, ...]``, by the names of the modelling file; none of an empty S."""
    tensors = {
        "u": [[part.left_OR for part in parts] for parts in experts],
        "v": [[part.right_RI for part in parts] for parts in experts],
        "s": [[part.sparse_CI for part in parts] for parts in experts],
        "rows": [[part.rows_C.to(torch.int32) for part in parts] for parts in experts],
    }
    stacked = {
        # Those that found no room on the device are on the host.
        name: torch.stack([torch.stack([part.cpu() for part in parts]) for parts in values])
        for name, values in tensors.items()
    }
    return {name: tensor for name, tensor in stacked.items() if tensor.numel()}
