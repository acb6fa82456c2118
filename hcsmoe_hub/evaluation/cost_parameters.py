"""Parameters and bytes of a checkpoint, from its config and headers."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from hcsmoe_hub.checkpoint.modeling_hcsmoe_factored import experts_modules
from hcsmoe_hub.checkpoint.tensors import total_bytes
from hcsmoe_hub.evaluation.checkpoint import Checkpoint
from hcsmoe_hub.model.expert_kinds import experts_of, is_experts_module
from hcsmoe_hub.model.skeleton import Skeleton


def count_parameters(checkpoint: Checkpoint, skeleton: Skeleton) -> dict[str, int]:
    """Counts what is stored and what is loaded, in any layout; shared parameters are counted once.

    Args:
        checkpoint: The checkpoint.
        skeleton: Its model without weights, in the dtype that it runs in.

    Returns:
        ``parameters`` of all that is stored; ``embedding_parameters``, those among them of the input embedding, which
        are looked up and not multiplied; ``disk_bytes`` of all stored tensors; ``memory_bytes`` of what is loaded.
    """
    loaded = _loaded(skeleton)
    tensors, unused = checkpoint.placement.tensors, checkpoint.placement.unused
    embedding: Any = skeleton.module.get_input_embeddings()
    return {
        "parameters": sum(tensor.numel() for tensor in loaded.values())
        + sum(math.prod(tensors[name].shape) for name in unused),
        "embedding_parameters": embedding.weight.numel(),
        "disk_bytes": total_bytes(checkpoint.source.tensors.values()),
        "memory_bytes": sum(tensor.nbytes for name, tensor in loaded.items() if name not in skeleton.aside),
    }


def active_parameters(skeleton: Skeleton, active_experts: Mapping[str, int]) -> int:
    """Parameters that one token uses: all that are loaded but the experts that it is not routed to.

    Where router rows share experts, several of a token's choices may lead to the same one; they are counted as
    different experts.

    Args:
        skeleton: The model without weights.
        active_experts: Experts per token by the name of the experts module.
    """
    loaded = _loaded(skeleton)
    idle = 0
    for name, count, holder in _experts(skeleton):
        stored = sum(tensor.numel() for parameter, tensor in loaded.items() if parameter.rpartition(".")[0] == holder)
        idle += stored // count * max(count - active_experts[name], 0)
    return sum(tensor.numel() for tensor in loaded.values()) - idle


def _loaded(skeleton: Skeleton) -> dict[str, Tensor]:
    """What a model loads, without the second name of shared parameters."""
    shared = skeleton.module.all_tied_weights_keys.keys()
    return {name: tensor for name, tensor in skeleton.state.items() if name not in shared}


def _experts(skeleton: Skeleton) -> Iterator[tuple[str, int, str]]:
    """Name, number of experts, and name of the module that holds the weights, of every experts module."""
    if skeleton.factors is not None:
        for name, experts in experts_modules(skeleton.module).items():
            yield name, len(experts.incoming_u), name
        return
    for name, module in skeleton.module.named_modules():
        if is_experts_module(module):
            experts = experts_of(module)
            yield name, experts.num_experts, f"{name}.mlp" if type(module).__name__ == "DbrxExperts" else name
