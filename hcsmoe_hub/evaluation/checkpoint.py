"""A checkpoint to evaluate: its skeleton, its sizes, and its identity."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hcsmoe_hub.checkpoint.formats import logical_tensors
from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.events import Listener
from hcsmoe_hub.machine.allocator import mapping_large_tensors
from hcsmoe_hub.model.check import check_against_config
from hcsmoe_hub.model.layer_loader import LayerLoader
from hcsmoe_hub.model.raw_config import check_stored, translated_errors
from hcsmoe_hub.model.skeleton import Skeleton
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
        max_positions: Maximum sequence length, ``None`` if the config does not state one.
        vocab_size: Number of logits.
        hidden_size: Width of the hidden states.
        nbytes: Size in float32.

    Raises:
        SourceError: If its config or its tensors are damaged.
        UnsupportedModelError: If transformers does not know the model.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        check_stored(source.config, source.tensors, label=source.label)
        skeleton = self.skeleton()
        tensors = logical_tensors(source.config, source.tensors)
        self._placement = skeleton.place(tensors)
        check_against_config(skeleton, self._placement, tensors)
        config = skeleton.text_config
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        shared = skeleton.module.all_tied_weights_keys.keys()
        self.nbytes = sum(
            DTYPE.itemsize * tensor.numel() for name, tensor in skeleton.state.items() if name not in shared
        )

    def skeleton(self) -> Skeleton:
        """The model without weights; every call builds a new one.

        Raises:
            SourceError: If transformers cannot build a model from the config.
        """
        with translated_errors(self.source.label):
            return Skeleton(self.source.config, DTYPE)

    @contextmanager
    def loading(self, skeleton: Skeleton, device: torch.device, emit: Listener) -> Iterator[LayerLoader]:
        """Loads weights into a skeleton of this checkpoint.

        Args:
            skeleton: The skeleton to fill.
            device: Device of the decoder layers; everything outside them is loaded to the CPU.
            emit: Called with downloads.
        """
        with mapping_large_tensors(), sequential_loading(), TensorReader(self.source, emit=emit) as reader:
            loader = LayerLoader(skeleton, self._placement, reader, device=device)
            try:
                yield loader
            finally:
                loader.close()

    def describe(self) -> dict[str, Any]:
        """The checkpoint's identity, as result files record it."""
        return describe_source(self.source)
