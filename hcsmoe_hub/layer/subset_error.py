"""The error that a subset of the experts leaves, with the block's own router restricted to it."""

from torch import Tensor

from hcsmoe_hub.layer.deviation import relative_error
from hcsmoe_hub.layer.distances import outputs_of
from hcsmoe_hub.layer.reduced_block import load_reduced
from hcsmoe_hub.layer.weights import BlockWeights
from hcsmoe_hub.methods.pruning.subsets import Subset
from hcsmoe_hub.model.blocks import MoEBlock
from hcsmoe_hub.model.microbatch import MicroBatcher
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.observation.observers import SubsetObserver
from hcsmoe_hub.observation.sample import NeuronSample
from hcsmoe_hub.observation.statistics import Call
from hcsmoe_hub.observation.watcher import rerun

# Memory for the outputs of all experts, which every subset adds up anew.
OUTPUTS_BYTES = 1 << 29


class SubsetError:
    """Relative error of a block's routed output when its router may choose from a subset of the experts only.

    Every expert runs once on every sampled token; a subset then costs one run of the router.

    Args:
        model: The source, the layer's weights in memory.
        reduced: Skeleton of the result.
        block: The block.
        weights: Its weights.
        sample: What its experts are given for ``call``.
        call: Inputs of the block for the sampled tokens.
        batcher: Knows the device.
    """

    def __init__(
        self,
        model: SourceModel,
        reduced: Skeleton,
        block: MoEBlock,
        weights: BlockWeights,
        *,
        sample: NeuronSample,
        call: Call,
        batcher: MicroBatcher,
    ) -> None:
        self._model = model
        self._reduced = reduced
        self._block = block
        self._weights = weights
        self._batcher = batcher
        token_bytes = sample.experts.num_experts * sample.tokens_TH[0].nbytes
        tokens = min(len(sample.tokens_TH), max(1, OUTPUTS_BYTES // token_bytes))
        args = tuple(value[:, :tokens] for value in call.args)
        self._call = Call(args, {name: value[:, :tokens] for name, value in call.kwargs.items()})
        self._outputs_ETH = outputs_of(sample.experts, sample.tokens_TH[:tokens])
        self._full_TH = self._run(model.skeleton, tuple(range(sample.experts.num_experts)))

    def __call__(self, kept: Subset) -> float:
        """The error of keeping some experts, ascending."""
        rows = {name: rows_E[list(kept)] for name, rows_E in self._weights.router.items()}
        changed = {tensor.name: self._weights.join(tensor, rows[tensor.name]) for tensor in self._block.router}
        # The experts themselves never run here, so they stay without weights.
        changed |= {tensor.name: self._reduced.state[tensor.name] for tensor in self._block.experts}
        load_reduced(self._model, self._reduced, self._block, changed, self._batcher.device)
        return relative_error([self._full_TH], [self._run(self._reduced, kept)])

    def _run(self, skeleton: Skeleton, kept: Subset) -> Tensor:
        """Routed output ``[T, H]`` of the block when its router chooses from ``kept``."""
        moe = skeleton.module.get_submodule(self._block.path)
        experts = skeleton.module.get_submodule(self._block.experts_path)

        def observer() -> SubsetObserver:
            return SubsetObserver(self._outputs_ETH, kept)

        return rerun(moe, experts, [self._call], observer, batcher=self._batcher, whole_layer=False).outputs[0]
