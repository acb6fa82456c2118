"""One pass of the model's own forward over the calibration set, with one layer in memory at a time.

The model calls its layers; each call brings the weights, lets a visitor run the layer and work on it, and frees them.
Masks, rotary tables and whatever else a layer takes come from the model itself, so hybrids work like the rest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hcsmoe_hub.machine.accelerator import HOST
from hcsmoe_hub.machine.allocator import return_freed_memory
from hcsmoe_hub.model.layer_loader import LayerLoader, free
from hcsmoe_hub.model.microbatch import MicroBatcher
from hcsmoe_hub.model.mtp import enter, running_head
from hcsmoe_hub.model.sequences import encode, run_through, stack_lengths
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.observation.statistics import Call
from hcsmoe_hub.pipeline.rows import Rows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StreamedLayer:
    """One layer while its weights are in memory.

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


def _nothing_is_recalled(inputs: Call) -> Any:
    raise AssertionError("no layer is finished")


def _forget(encoded_RSH: Tensor) -> None:
    """Has no use for what left an encoder."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Visitor:
    """What happens to layers, some of which an earlier run may have finished.

    Attributes:
        visit: Called for every other layer while its weights are in memory.
        recall: Called in place of a finished layer with its inputs; returns what left the last one. These layers are
            neither read nor run: of what they return, nothing but that of the last one is used.
        last: The last finished layer; -1 if there is none.
        with_head: Whether an MTP head runs, if there is one.
        on_encoded: Called with what left an encoder, ``[R, S, H]`` on the host, before the first layer of the decoder.
        encoded_RSH: The same from an earlier run that has finished some of the decoder's layers.
    """

    visit: Visit
    recall: Callable[[Call], Any] = _nothing_is_recalled
    last: int = -1
    with_head: bool = True
    on_encoded: Callable[[Tensor], None] = _forget
    encoded_RSH: Tensor | None = None

    def encode(self, skeleton: Skeleton, ids_RS: Tensor) -> Tensor:
        """What left the encoder, which only runs if no layer of the decoder is finished."""
        encoded_RSH = self.encoded_RSH
        if self.last < skeleton.encoder_depth or encoded_RSH is None:
            encoded_RSH = encode(skeleton, ids_RS)
        self.on_encoded(encoded_RSH)
        return encoded_RSH


def make_batcher(
    skeleton: Skeleton,
    token_ids: Tensor,
    *,
    batch_tokens: int,
    device: torch.device,
    home: torch.device | None = None,
) -> MicroBatcher:
    """Chooses the micro-batch for a calibration set.

    Args:
        skeleton: The model.
        token_ids: ``[B, S]``; where an encoder reads some of a sequence, both parts of it.
        batch_tokens: Tokens per micro-batch, at most; one sequence at least.
        device: Where layers run.
        home: Where everything is kept that belongs to all sequences; by default the device.
    """
    sequences, length = token_ids.shape
    batch = min(sequences, max(1, batch_tokens // length))
    if getattr(skeleton.text_config, "num_kv_shared_layers", None):
        # Layers pass keys and values on, so nothing is cut.
        batch = sequences
    return MicroBatcher(sequences, batch, device, home=home)


def lengths(skeleton: Skeleton, token_ids: Tensor, source_length: int = 0) -> set[int]:
    """Tokens per sequence in the layers of a model: an MTP head sees one less, for it takes the next token as well.

    Args:
        skeleton: The model.
        token_ids: ``[B, S + T]``.
        source_length: S, the tokens that an encoder reads; 0 without one.
    """
    found = stack_lengths(token_ids, source_length)
    return found if skeleton.mtp is None else found | {token_ids.shape[1] - 1}


def stream(
    skeleton: Skeleton,
    loader: LayerLoader,
    visit: Visit | Visitor,
    token_ids: Tensor,
    *,
    batcher: MicroBatcher,
    source_length: int = 0,
) -> Tensor:
    """Runs all tokens through the model, layer by layer: its encoder, its decoder, and at last its MTP head.

    Args:
        skeleton: The model; only what lies outside its layers is loaded.
        loader: Brings the weights of a layer.
        visit: Called for every layer while its weights are in memory; a ``Visitor`` if there is more to say.
        token_ids: ``[B, S + T]`` int64.
        batcher: Cuts the sequences into micro-batches.
        source_length: S, the tokens that an encoder reads, while the others are what its decoder writes; 0 for a model
            without an encoder, of which S is 0.

    Returns:
        The hidden states after the decoder's last norm, ``[B, T, H]``.
    """
    skeleton.module.tie_weights()
    rows = Rows({"all": token_ids}, lengths=lengths(skeleton, token_ids, source_length))
    visitor = visit if isinstance(visit, Visitor) else Visitor(visit=visit)

    def visit_all(layer: StreamedLayer, inputs: Call) -> Any:
        return rows.join({"all": visitor.visit(layer, rows.split(inputs)["all"])})

    def recall_all(*args: Any, **kwargs: Any) -> Any:
        return rows.join({"all": visitor.recall(rows.split(Call(args, kwargs))["all"])})

    for index, module in enumerate(skeleton.layers):
        run = partial(_forward, index, module, loader, visit_all, batcher)
        vars(module)["forward"] = recall_all if index <= visitor.last else run
    with torch.no_grad():
        hidden_RTH = run_through(skeleton, rows.batch, source_length=source_length, encode=visitor.encode)
        if skeleton.mtp is not None and visitor.with_head and visitor.last < skeleton.mtp.layer:
            _stream_head(skeleton, loader, visit_all, rows.batch, hidden_RTH, batcher=batcher)
    return hidden_RTH[: len(token_ids)]


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
    hidden_RSH: Tensor,
    *,
    batcher: MicroBatcher,
) -> None:
    """Runs an MTP head over the same tokens: the model's own forward calls its decoder layer in place of the first.

    Args:
        skeleton: The model.
        loader: Brings the weights of the head.
        visit: Called for its decoder layer.
        token_ids: ``[R, S]`` int64.
        hidden_RSH: The model's hidden states after the final norm.
        batcher: Cuts the sequences into micro-batches.
    """
    assert skeleton.mtp is not None, "there is a head to run"
    index = skeleton.mtp.layer
    module, embedding = skeleton.layers[index], skeleton.module.get_input_embeddings()
    originals = loader.take(index)
    # All sets of hidden states go in at once, where there are several.
    rows = batcher.sized(len(token_ids), batcher.batch)
    inputs = rows.wrap(partial(enter, module), lambda: None)(embedding(token_ids[:, 1:]), hidden_RSH[:, :-1]).to(HOST)
    layer = StreamedLayer(index=index, module=module, originals=originals, loader=loader, batcher=batcher)
    vars(skeleton.layers[0])["forward"] = lambda *args, **kwargs: visit(layer, Call(args, kwargs))
    with running_head(skeleton.config):
        skeleton.decoder(inputs_embeds=inputs, use_cache=False)
    free(module)
    return_freed_memory()
