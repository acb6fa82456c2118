"""The error that a subset of the experts leaves, with the block's own router restricted to it."""

from torch import Tensor

from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.layer.deviation import relative_error
from hcsmoe_hub.layer.distances import outputs_of
from hcsmoe_hub.layer.weights import BlockWeights
from hcsmoe_hub.methods.pruning.subsets import Subset
from hcsmoe_hub.observation.observers import SubsetObserver
from hcsmoe_hub.observation.runnable_block import RunnableBlock
from hcsmoe_hub.observation.sample import NeuronSample
from hcsmoe_hub.observation.statistics import Call

# Memory for the outputs of all experts, which every subset adds up anew.
OUTPUTS_BYTES = 1 << 29


class SubsetError:
    """Relative error of a block's routed output when its router may choose from a subset of the experts only.

    Every expert runs once on every sampled token; a subset then costs one run of the router.

    Args:
        layer: The layer.
        weights: The weights of its block.
        sample: What its experts are given for ``call``.
        call: Inputs of the block for the sampled tokens.
    """

    def __init__(self, layer: LayerContext, weights: BlockWeights, *, sample: NeuronSample, call: Call) -> None:
        assert layer.result is not None, "pruning always has the reduced layout"
        self._layer = layer
        self._weights = weights
        # The experts themselves never run here, so they stay without weights.
        self._idle = {tensor.name: layer.result.state[tensor.name] for tensor in layer.block.experts}
        token_bytes = sample.experts.num_experts * sample.tokens_TH[0].nbytes
        tokens = min(len(sample.tokens_TH), max(1, OUTPUTS_BYTES // token_bytes))
        args = tuple(_first(value, tokens) for value in call.args)
        self._call = Call(args, {name: _first(value, tokens) for name, value in call.kwargs.items()})
        self._outputs_ETH = outputs_of(sample.experts, sample.tokens_TH[:tokens])
        self._full_TH = self._run(layer.source, tuple(range(sample.experts.num_experts)))

    def __call__(self, kept: Subset) -> float:
        """The error of keeping some experts, ascending."""
        rows = {name: rows_E[list(kept)] for name, rows_E in self._weights.router.items()}
        router = {tensor.name: self._weights.join(tensor, rows[tensor.name]) for tensor in self._layer.block.router}
        with self._layer.reduced(router | self._idle) as reduced:
            return relative_error([self._full_TH], [self._run(reduced, kept)])

    def _run(self, block: RunnableBlock, kept: Subset) -> Tensor:
        """Routed output ``[T, H]`` of a block whose router chooses from ``kept``."""
        return block.rerun([self._call], lambda: SubsetObserver(self._outputs_ETH, kept)).outputs[0]


def _first(value: Tensor | None, tokens: int) -> Tensor | None:
    """The first tokens of an input ``[1, T, ...]``; blocks may take inputs that are ``None`` in the first layer."""
    return None if value is None else value[:, :tokens]
