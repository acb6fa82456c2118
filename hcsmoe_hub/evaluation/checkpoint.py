"""A checkpoint to evaluate: its skeleton, its sizes, and its identity."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hcsmoe_hub.checkpoint.formats import logical_tensors
from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.events import Listener
from hcsmoe_hub.machine.allocator import mapping_large_tensors
from hcsmoe_hub.model.check import check_against_config
from hcsmoe_hub.model.layer_loader import LayerLoader
from hcsmoe_hub.model.raw_config import check_stored, translated_errors
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.model.stacked_experts import shares_biases
from hcsmoe_hub.model.transformers_seam import sequential_loading
from hcsmoe_hub.result.make_report import describe_source

# Figures are measured in float32, whatever the checkpoint stores.
DTYPE = torch.float32


class Checkpoint:
    """A checkpoint that can be loaded whole or layer by layer; code inside the checkpoint is never run.

    A result in the mapped layout is run by the code of this package, not by the modelling file in its folder.

    Args:
        source: Folder or repository of the checkpoint.

    Attributes:
        source: Folder or repository of the checkpoint.
        placement: Where its stored tensors belong in the model.
        max_positions: Maximum sequence length, ``None`` if the config does not state one.
        vocab_size: Number of logits.
        hidden_size: Width of the hidden states.
        has_encoder: Whether an encoder reads a source before the decoder writes.
        shares_biases: Whether what its layers share differs between sources of different lengths.
        nbytes: Size of what runs, in float32.

    Raises:
        SourceError: If its config or its tensors are damaged.
        UnsupportedModelError: If transformers does not know the model.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        check_stored(source.config, source.tensors, label=source.label)
        skeleton = self.skeleton()
        tensors = logical_tensors(source.config, source.tensors)
        self.placement = skeleton.place(tensors)
        check_against_config(skeleton, self.placement, tensors)
        config = skeleton.text_config
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        self.has_encoder = skeleton.is_encoder_decoder
        self.shares_biases = shares_biases(skeleton.layers)
        # Shared parameters are one; a vision tower is not loaded, as text does not run through it.
        left_out = skeleton.module.all_tied_weights_keys.keys() | skeleton.aside
        self.nbytes = sum(
            DTYPE.itemsize * tensor.numel() for name, tensor in skeleton.state.items() if name not in left_out
        )

    def skeleton(self, dtype: torch.dtype = DTYPE) -> Skeleton:
        """The model without weights; every call builds a new one.

        Args:
            dtype: Dtype of the weights once they are loaded.

        Raises:
            SourceError: If transformers cannot build a model from the config.
        """
        with translated_errors(self.source.label):
            return Skeleton(self.source.config, dtype)

    def filled(self, device: torch.device, emit: Listener, dtype: torch.dtype = DTYPE) -> Skeleton:
        """The whole model with its weights on a device.

        Args:
            device: Where it runs.
            emit: Called with downloads.
            dtype: Dtype of its weights; dequantised ones too.
        """
        skeleton = self.skeleton(dtype)
        with self.loading(skeleton, device, emit) as loader:
            loader.load(None)
            for layer in range(len(skeleton.layers)):
                loader.load(layer)
        skeleton.module.tie_weights()
        # Dequantised weights arrive in bfloat16.
        nn.Module.to(skeleton.module, device, dtype)
        return skeleton

    @contextmanager
    def loading(self, skeleton: Skeleton, device: torch.device, emit: Listener) -> Iterator[LayerLoader]:
        """Loads weights into a skeleton of this checkpoint.

        Args:
            skeleton: The skeleton to fill.
            device: Device of the decoder layers; everything outside them is loaded to the CPU.
            emit: Called with downloads.
        """
        with mapping_large_tensors(), sequential_loading(), TensorReader(self.source, emit=emit) as reader:
            loader = LayerLoader(skeleton, self.placement, reader, device=device)
            try:
                yield loader
            finally:
                loader.close()

    def describe(self) -> dict[str, Any]:
        """The checkpoint's identity, as result files record it."""
        return describe_source(self.source)
