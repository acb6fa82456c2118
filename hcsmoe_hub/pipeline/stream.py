"""One pass of the model's own forward over the calibration set, with one decoder layer in memory at a time.

The model calls its layers; each call brings the weights, lets a visitor run the layer and work on it, and frees them.
Masks, rotary tables and whatever else a layer takes come from the model itself, so hybrids work like the rest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hcsmoe_hub.machine.allocator import return_freed_memory
from hcsmoe_hub.model.layer_loader import LayerLoader, free
from hcsmoe_hub.model.microbatch import MicroBatcher
from hcsmoe_hub.model.mtp import enter, running_head
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.observation.statistics import Call


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StreamedLayer:
    """One decoder layer while its weights are in memory.

    Attributes:
        index: Its number.
        module: Its module.
        originals: Its router tensors as stored, by parameter name.
        loader: Loads the next layer meanwhile.
        batcher: Cuts the sequences into micro-batches.
    """

    index: int
    module: nn.Module
    originals: Mapping[str, Tensor]
    loader: LayerLoader
    batcher: MicroBatcher

    def run(self, inputs: Call, on_attempt: Callable[[], None] = lambda: None) -> Any:
        """Runs the layer over all sequences, and waits until the next one is loaded.

        Args:
            inputs: Inputs of all sequences.
            on_attempt: Called before the first sequence, and again whenever the layer has to start over with smaller
                micro-batches.

        Returns:
            The output for all sequences.
        """
        # The layer's own forward: the one on the instance is that of the stream.
        forward = self.batcher.wrap(partial(type(self.module).forward, self.module), on_attempt)
        output = forward(*inputs.args, **inputs.kwargs)
        # Loading and merging at once would add up to a higher peak.
        self.loader.settle()
        return_freed_memory()
        return output


# Runs a layer on its inputs, works on it, and returns what the model is to go on with.
Visit: TypeAlias = Callable[[StreamedLayer, Call], Any]


def make_batcher(skeleton: Skeleton, token_ids: Tensor, *, batch_tokens: int, device: torch.device) -> MicroBatcher:
    """Chooses the micro-batch for a calibration set ``[B, S]``."""
    sequences, length = token_ids.shape
    batch = min(sequences, max(1, batch_tokens // length))
    if sequences in lengths(skeleton, token_ids) or getattr(skeleton.text_config, "num_kv_shared_layers", None):
        # Either it is unclear which dimension is the batch, or layers pass keys and values on: nothing is cut.
        batch = sequences
    return MicroBatcher(sequences, batch, device)


def lengths(skeleton: Skeleton, token_ids: Tensor) -> set[int]:
    """Tokens per sequence in the layers of a model: an MTP head sees one less, for it takes the next token as well.

    Args:
        skeleton: The model.
        token_ids: ``[B, S]``.
    """
    length = token_ids.shape[1]
    return {length} if skeleton.mtp is None else {length, length - 1}


def stream(
    skeleton: Skeleton,
    loader: LayerLoader,
    visit: Visit,
    token_ids: Tensor,
    *,
    batcher: MicroBatcher,
    with_head: bool = True,
) -> Tensor:
    """Runs all tokens through the decoder, layer by layer, and at last through its MTP head.

    Args:
        skeleton: The model; only what lies outside its layers is loaded.
        loader: Brings the weights of a layer.
        visit: Called for every layer while its weights are in memory.
        token_ids: ``[B, S]`` int64.
        batcher: Cuts the sequences into micro-batches.
        with_head: Whether an MTP head runs, if there is one.

    Returns:
        The hidden states after the decoder's last norm, ``[B, S, H]``.
    """
    skeleton.module.tie_weights()
    for index, module in enumerate(skeleton.layers):
        vars(module)["forward"] = partial(_forward, index, module, loader, visit, batcher)
    with torch.no_grad():
        hidden_BSH: Tensor = skeleton.decoder(input_ids=token_ids, use_cache=False).last_hidden_state
        if skeleton.mtp is not None and with_head:
            _stream_head(skeleton, loader, visit, token_ids, hidden_BSH, batcher=batcher)
    return hidden_BSH


def _forward(
    index: int,
    module: nn.Module,
    loader: LayerLoader,
    visit: Visit,
    batcher: MicroBatcher,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What the model calls in place of a layer."""
    originals = loader.take(index)
    loader.prefetch(index + 1)
    layer = StreamedLayer(index=index, module=module, originals=originals, loader=loader, batcher=batcher)
    output = visit(layer, Call(args, kwargs))
    free(module)
    return_freed_memory()
    return output


def _stream_head(
    skeleton: Skeleton,
    loader: LayerLoader,
    visit: Visit,
    token_ids: Tensor,
    hidden_BSH: Tensor,
    *,
    batcher: MicroBatcher,
) -> None:
    """Runs an MTP head over the same tokens: the model's own forward calls its decoder layer in place of the first.

    Args:
        skeleton: The model.
        loader: Brings the weights of the head.
        visit: Called for its decoder layer.
        token_ids: ``[B, S]`` int64.
        hidden_BSH: The model's hidden states after the final norm.
        batcher: Cuts the sequences into micro-batches.
    """
    assert skeleton.mtp is not None, "there is a head to run"
    index = skeleton.mtp.layer
    module, embedding = skeleton.layers[index], skeleton.module.get_input_embeddings()
    originals = loader.take(index)
    # All sets of hidden states go in at once, where there are several.
    rows = MicroBatcher(len(token_ids), batcher.batch, batcher.device)
    inputs = rows.wrap(partial(enter, module), lambda: None)(embedding(token_ids[:, 1:]), hidden_BSH[:, :-1])
    layer = StreamedLayer(index=index, module=module, originals=originals, loader=loader, batcher=batcher)
    vars(skeleton.layers[0])["forward"] = lambda *args, **kwargs: visit(layer, Call(args, kwargs))
    with running_head(skeleton.config):
        skeleton.decoder(inputs_embeds=inputs, use_cache=False)
    free(module)
    return_freed_memory()
