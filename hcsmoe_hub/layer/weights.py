"""The expert-sized tensors of one MoE block while its layer is in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.model.blocks import ExpertTensor
from hcsmoe_hub.observation.overflow import check_weights


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockWeights:
    """Experts and router of one block, experts first.

    Attributes:
        state: The tensors as the model holds them, those of the router as the source stores them, by parameter name.
        experts: Rows of the experts ``[E, ...]`` by name relative to the experts module.
        router: Rows of the router ``[E, ...]`` by parameter name.
    """

    state: Mapping[str, Tensor]
    experts: dict[str, Tensor]
    router: dict[str, Tensor]

    @classmethod
    def of(cls, layer: LayerContext) -> Self:
        """Collects the tensors of a layer's block in the source.

        Raises:
            VerificationError: If one of them is not finite; names it.
        """
        check_weights(layer.source.skeleton, layer.block.layer, layer.block.edited)
        block, held = layer.block, layer.source.skeleton.module.state_dict()
        state = {name: tensor for name, tensor in held.items() if name in block.edited} | dict(layer.originals)
        return cls(
            state=state,
            experts={block.name_in_experts(tensor): tensor.split(state[tensor.name])[0] for tensor in block.experts},
            router={tensor.name: tensor.split(state[tensor.name])[0] for tensor in block.router},
        )

    def join(self, tensor: ExpertTensor, rows: Tensor) -> Tensor:
        """A tensor of the model from its experts' rows; rows that belong to no expert are the source's."""
        return tensor.join(rows, tensor.split(self.state[tensor.name])[1])
