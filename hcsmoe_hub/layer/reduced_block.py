"""The block of the result in memory, in the place of the one it stands for."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hcsmoe_hub.model.blocks import MoEBlock
from hcsmoe_hub.model.layer_loader import move_computed_buffers
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.model.source_model import SourceModel


def load_reduced(
    model: SourceModel, reduced: Skeleton, block: MoEBlock, changed: Mapping[str, Tensor], device: torch.device
) -> nn.Module:
    """The block of the result: changed tensors as given, weights or none, and all others from the source."""
    moe, prefix = reduced.module.get_submodule(block.path), f"{block.path}."
    current = model.skeleton.module.get_submodule(block.path).state_dict(prefix=prefix)
    state = {name: changed[name].to(tensor.dtype) if name in changed else tensor for name, tensor in current.items()}
    placed = {name: tensor if tensor.is_meta else tensor.to(device) for name, tensor in state.items()}
    moe.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in placed.items()}, assign=True)
    move_computed_buffers(moe, device)
    return moe
