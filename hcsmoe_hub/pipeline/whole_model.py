"""A whole checkpoint in memory, and what is trained of it as its shards store it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.events import Listener
from hcsmoe_hub.machine.allocator import mapping_large_tensors
from hcsmoe_hub.machine.device import compute_dtype
from hcsmoe_hub.methods.distil.training import Model
from hcsmoe_hub.model.layer_loader import LayerLoader, StoredForm
from hcsmoe_hub.model.sequences import model_inputs
from hcsmoe_hub.model.source_model import SourceModel, read_model
from hcsmoe_hub.model.trained import trained_parameters
from hcsmoe_hub.model.transformers_seam import sequential_loading


def load_whole(
    source: Source, device: torch.device, emit: Listener, *, compute: torch.dtype | None = None
) -> tuple[SourceModel, dict[str, Tensor]]:
    """A model with all of its weights in memory, but for what text does not run through.

    Args:
        source: Its checkpoint.
        device: Where it is to run.
        emit: Called with downloads.
        compute: Dtype in which bfloat16 weights are computed with; ``None`` for the one that the device is fast at.

    Returns:
        The model, and of its routers and norms the tensors as they are stored, by parameter name.
    """
    model = read_model(source, with_mtp=False, compute=compute or compute_dtype(device))
    skeleton, stored = model.skeleton, dict[str, Tensor]()
    kept = {tensor.name for block in model.decoder_blocks for tensor in block.experts}
    kept = set(trained_parameters(model)) - kept
    with mapping_large_tensors(), sequential_loading(), TensorReader(source, emit=emit) as reader:
        loader = LayerLoader(skeleton, model.placement, reader, device=device, stored=StoredForm(copies=kept))
        try:
            for layer in (None, *range(len(skeleton.layers))):
                stored |= loader.load(layer)
        finally:
            loader.close()
    skeleton.module.tie_weights()
    stacks = [skeleton.module.get_submodule(stack.runner_name) for stack in skeleton.stacks]
    for part in (*stacks, skeleton.module.get_output_embeddings()):
        nn.Module.to(part, device)
        if skeleton.dtype != torch.bfloat16:
            # Gradients in float16 would overflow, and dequantised weights arrive in bfloat16.
            nn.Module.to(part, torch.float32)
    return model, stored


def logits_of(model: SourceModel, device: torch.device, source_length: int = 0) -> Model:
    """The forward pass of a model in memory, from token ids ``[B, L]`` to logits ``[B, T, V]``; see ``model_inputs``.

    Args:
        model: The model.
        device: Where it lies.
        source_length: Tokens of each sequence that an encoder reads; 0 for a decoder alone.
    """
    module, config = model.skeleton.module, model.skeleton.config

    def run(ids_BL: Tensor) -> Tensor:
        logits: Tensor = module(**model_inputs(config, ids_BL.to(device), source_length), use_cache=False).logits
        return logits

    return run


def stored_dtypes(model: SourceModel) -> dict[str, torch.dtype]:
    """The dtype that each parameter is stored in, by its name."""
    return {
        target: model.tensors[name].dtype for group in model.groups.values() for name, target in group.targets.items()
    }


def stored_tensors(model: SourceModel, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters as the shards of their model store them, by stored name.

    Args:
        model: The model.
        values: Values by parameter name.
    """
    skeleton, found = model.skeleton, dict[str, Tensor]()
    for layer, group in model.groups.items():
        own = {name: value for name, value in values.items() if skeleton.layer_of(name) == layer}
        stored = skeleton.to_stored(own, group) if own else {}
        found |= {name: tensor.to(model.tensors[name].dtype) for name, tensor in stored.items()}
    return found
