"""One MoE layer that is being converted: the block of the source, and the one of the result that takes its place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hcsmoe_hub.model.blocks import MoEBlock
from hcsmoe_hub.model.layer_loader import free, move_computed_buffers
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.observation.runnable_block import RunnableBlock
from hcsmoe_hub.planning.expert_shape import ExpertShape


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerContext:
    """What every step of a layer's conversion works with, while the layer's weights are in memory.

    Attributes:
        source: The block of the source.
        result: The result without weights; ``None`` where it has as many router rows as the source.
        shape: Number and width of the experts of the result.
        originals: Router tensors of the source as stored, by parameter name.
        experts_on_host: Whether experts wait on the host until they run, because they do not fit the device.
    """

    source: RunnableBlock
    result: Skeleton | None
    shape: ExpertShape
    originals: Mapping[str, Tensor]
    experts_on_host: bool = False

    @property
    def block(self) -> MoEBlock:
        """Where the block is in the source."""
        return self.source.block

    @property
    def device(self) -> torch.device:
        """Where the layer runs."""
        return self.source.device

    def expert_shapes(self) -> dict[str, torch.Size]:
        """Shape of one expert of the result in every tensor, by name relative to the experts module."""
        assert self.result is not None, "only the reduced layout has experts of another shape"
        return {
            self.block.name_in_experts(tensor): tensor.split(self.result.state[tensor.name])[0].shape[1:]
            for tensor in self.shape.block(self.block).experts
        }

    @contextmanager
    def reduced(self, changed: Mapping[str, Tensor]) -> Iterator[RunnableBlock]:
        """The block of the result in memory, inside a ``with`` block.

        Args:
            changed: Tensors that differ from the source's, by parameter name; without storage where they never run.
                All others are the source's.
        """
        assert self.result is not None, "only the reduced layout has a block of its own"
        block = RunnableBlock(skeleton=self.result, block=self.shape.block(self.block), batcher=self.source.batcher)
        moe, prefix = block.moe, f"{self.block.path}."
        current = self.source.moe.state_dict(prefix=prefix)
        state = {name: changed[name].to(value.dtype) if name in changed else value for name, value in current.items()}
        experts = {tensor.name for tensor in self.block.experts} if self.experts_on_host else frozenset[str]()
        placed = {
            name: value if value.is_meta or name in experts else value.to(self.device) for name, value in state.items()
        }
        moe.load_state_dict({name.removeprefix(prefix): value for name, value in placed.items()}, assign=True)
        # A fit replaces what the module holds; nothing else may keep it in memory.
        del current, state, placed
        move_computed_buffers(moe, self.device)
        try:
            yield block
        finally:
            free(moe)
