"""A checkpoint to evaluate: its skeleton, its sizes, and its identity."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from hcsmoe_hub.checkpoint.reader import TensorReader
from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.events import Listener
from hcsmoe_hub.machine.allocator import mapping_large_tensors
from hcsmoe_hub.model.check import check_against_config
from hcsmoe_hub.model.layer_loader import LayerLoader
from hcsmoe_hub.model.skeleton import Group, Skeleton
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
        skeleton = self.skeleton()
        self._groups: Mapping[int | None, Group] = skeleton.group_keys(source.tensors)[0]
        check_against_config(skeleton, self._groups, source.tensors)
        config = skeleton.config.get_text_config()
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
        try:
            return Skeleton(self.source.config, DTYPE)
        except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise SourceError(
                f"transformers cannot build a model from config.json of {self.source.label}: {reason}",
                hint="correct config.json, or download it again",
            ) from error

    @contextmanager
    def loading(self, skeleton: Skeleton, device: torch.device, emit: Listener) -> Iterator[LayerLoader]:
        """Loads weights into a skeleton of this checkpoint.

        Args:
            skeleton: The skeleton to fill.
            device: Device of the decoder layers; everything outside them is loaded to the CPU.
            emit: Called with downloads.
        """
        with mapping_large_tensors(), sequential_loading(), TensorReader(self.source, emit=emit) as reader:
            loader = LayerLoader(skeleton, self._groups, reader, device=device)
            try:
                yield loader
            finally:
                loader.close()

    def describe(self) -> dict[str, Any]:
        """The checkpoint's identity, as result files record it."""
        return describe_source(self.source)
