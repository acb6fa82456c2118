"""The hidden states of the reduced model next to those of the source: what its layers will see, and are fitted on.

B sequences of S tokens, T = B * S tokens, H hidden size.
"""

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from hcsmoe_hub.events import Listener, Warned
from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.model.experts import Experts, Observer
from hcsmoe_hub.model.microbatch import MicroBatcher, join, select
from hcsmoe_hub.observation.observers import RoutedObserver
from hcsmoe_hub.observation.runnable_block import RunnableBlock
from hcsmoe_hub.observation.statistics import Call
from hcsmoe_hub.observation.watcher import Observation, remembering_calls
from hcsmoe_hub.pipeline.stream import StreamedLayer

# Sizes of the noise that a layer is probed with, token by token: a norm behind the experts would make them equal.
PROBE_SIZES = (0.5, 1.0, 2.0)
# Rounding leaves a fraction of one unit in the last place; a norm, hundreds.
MAX_ROUNDING = 1.0


class MergedStream:
    """The second of two sets of hidden states that the model's own forward carries along.

    Every calibration sequence is in the model's batch twice, so whatever the model does between its layers it does to
    both: rows 0 to B - 1 are the source's, rows B to 2B - 1 the reduced model's. Until the first converted layer both
    are the same and nothing is computed twice.

    In every layer, ``split`` comes first, then ``wanted`` if its MoE block is converted, then ``advance`` and ``join``.

    Args:
        batcher: Cuts the B sequences into micro-batches.
        emit: Called with warnings.
        compensates: Whether what blocks are fitted to makes up for what earlier layers have changed; the fit of a
            router does not look at outputs.

    Attributes:
        sequences: B.
    """

    def __init__(self, batcher: MicroBatcher, emit: Listener, *, compensates: bool) -> None:
        self._batcher = batcher
        self._emit = emit
        self._compensates = compensates
        self.sequences = batcher.sequences
        self._rows = 2 * batcher.sequences
        self._is_apart = False
        self._has_warned = False

    def double(self, token_ids: Tensor, lengths: Set[int]) -> Tensor:
        """The batch ``[2B, S]`` of both streams; a few rows more where there would be as many rows as tokens.

        Args:
            token_ids: ``[B, S]``.
            lengths: Tokens per sequence in any of the layers.
        """
        self._rows = next(rows for rows in count(2 * len(token_ids)) if rows not in lengths)
        extra = self._rows - 2 * len(token_ids)
        return torch.cat([token_ids, token_ids, *[token_ids[:1]] * extra])

    def split(self, inputs: Call) -> tuple[Call, Call]:
        """A layer's inputs in the source and in the reduced model, from those of both."""
        first, second = slice(0, self.sequences), slice(self.sequences, 2 * self.sequences)
        source, reduced = (
            Call(select(inputs.args, rows, self._rows), select(dict(inputs.kwargs), rows, self._rows))
            for rows in (first, second)
        )
        return source, reduced

    def join(self, output: Any, reduced: Any) -> Any:
        """The output of a layer for both, from its outputs in the source and in the reduced model."""
        extra = self._rows - 2 * self.sequences
        return join([output, reduced, *[select(output, slice(0, 1), self.sequences)] * extra])

    def wanted(
        self, layer: StreamedLayer, context: LayerContext, *, inputs: Call, output: Any, seen: Observation
    ) -> Observation:
        """What a block is fitted to.

        Its inputs are those of the reduced model. Its wanted routed outputs are ``Y + (H - H') / g``: Y is what the
        source's experts return on these inputs, H' what leaves the source's layer then, and H what leaves it in the
        source; g is what the layer multiplies the routed output by before it is added to everything else. A block that
        returns them makes up for all that the layers before it have changed. Where the layer does anything but add,
        they are the outputs in the source.

        Args:
            layer: The layer, which has run on the source's inputs.
            context: The same for its MoE block.
            inputs: Its inputs in the reduced model.
            output: What it returned in the source.
            seen: What was observed of it in the source; statistics and choices stay those.
        """
        if not self._is_apart:
            return seen
        gain = self._gain(layer, context.source, inputs) if self._compensates else None
        moe, experts = context.source.moe, context.source.experts
        observer, calls = RoutedObserver(), list[Call]()

        def restart() -> None:
            nonlocal observer
            calls.clear()
            observer = RoutedObserver()
            experts.observe(moe, observer)

        with remembering_calls(moe, calls), experts.observing(moe, observer):
            found = layer.run(inputs, restart)
        wanted = seen.outputs
        if gain is not None:
            wanted = _compensate(_hidden(output), _hidden(found), observer.outputs, gain)
        elif self._compensates and not self._has_warned:
            self._has_warned = True
            self._emit(
                Warned(
                    f"layer {layer.index}: more than a sum lies between its experts and what leaves the layer, so "
                    "what earlier layers have changed is not made up for."
                )
            )
        return replace(seen, calls=calls, outputs=wanted)

    def advance(
        self,
        layer: StreamedLayer,
        context: LayerContext | None,
        *,
        inputs: Call,
        output: Any,
        changed: Mapping[str, Tensor],
    ) -> Any:
        """Takes the reduced model's hidden states through a layer.

        Args:
            layer: The layer; the weights of its experts need not be in memory any more.
            context: The same for its MoE block; ``None`` if it has none.
            inputs: Its inputs in the reduced model.
            output: What it returned in the source.
            changed: Tensors of the block in the result, by parameter name.

        Returns:
            What it returns in the reduced model.
        """
        if context is None:
            return layer.run(inputs) if self._is_apart else output
        self._is_apart = True
        with context.reduced(changed) as reduced, _in_place_of(context.source, reduced):
            moe, experts = reduced.moe, reduced.experts

            def restart() -> None:
                experts.observe(moe, RoutedObserver())

            with experts.observing(moe, RoutedObserver()):
                return layer.run(inputs, restart)

    def _gain(self, layer: StreamedLayer, block: RunnableBlock, inputs: Call) -> float | None:
        """What a layer multiplies the routed output by before it adds it; ``None`` if it does anything else.

        It runs on one micro-batch, its experts replaced first by nothing and then by noise.
        """
        rows = min(self._batcher.batch, self.sequences)
        batcher = MicroBatcher(rows, rows, self._batcher.device)
        args, kwargs = inputs.args, dict(inputs.kwargs)
        if rows < self.sequences:
            args, kwargs = (select(values, slice(0, rows), self.sequences) for values in (args, kwargs))
        moe, experts = block.moe, block.experts

        def run(observer: Observer) -> Tensor:
            forward = partial(type(layer.module).forward, layer.module)
            with experts.observing(moe, observer):
                return _hidden(batcher.wrap(forward, lambda: None)(*args, **kwargs))

        silent = run(_Noise(0.0))
        noise = _Noise(float(silent.float().abs().median()) or 1.0)
        return find_gain(run(noise), silent, noise.values_TH)


@contextmanager
def _in_place_of(source: RunnableBlock, reduced: RunnableBlock) -> Iterator[None]:
    """Lets a layer of the source run with the reduced block, inside a ``with`` block."""
    owner, _, name = source.block.path.rpartition(".")
    parent, before = source.skeleton.module.get_submodule(owner), source.moe
    setattr(parent, name, reduced.moe)
    try:
        yield
    finally:
        setattr(parent, name, before)


class _Noise:
    """Returns seeded noise in place of the routed output, its size different from token to token."""

    def __init__(self, size: float) -> None:
        self._size = size
        self.values_TH = torch.empty(0)

    def __call__(self, experts: Experts, tokens_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        size_T = torch.tensor(PROBE_SIZES).repeat(-(-len(tokens_TH) // len(PROBE_SIZES)))[: len(tokens_TH)]
        values_TH = self._size * size_T[:, None] * torch.randn(tokens_TH.shape, generator=generator)
        self.values_TH = values_TH.to(tokens_TH.dtype)
        return self.values_TH.to(tokens_TH.device)


def find_gain(loud: Tensor, silent: Tensor, values_TH: Tensor) -> float | None:
    """The number g for which ``loud = silent + g * values``, but for rounding; ``None`` if there is none.

    Args:
        loud: What leaves a layer whose experts return ``values_TH``.
        silent: What leaves it if they return nothing.
        values_TH: ``[T, H]``.
    """
    if loud.numel() != values_TH.numel():
        return None
    values, change = values_TH.flatten().double(), (loud.double() - silent.double()).flatten()
    gain = float(values @ change / (values @ values))
    unit = torch.finfo(loud.dtype).eps
    size = loud.flatten().abs().double() + silent.flatten().abs().double() + (gain * values).abs()
    is_exact = (change - gain * values).abs() <= MAX_ROUNDING * unit * size
    return gain if gain and float(is_exact.double().mean()) > 0.5 else None


def _hidden(output: Any) -> Tensor:
    """The hidden states among what a layer returns."""
    hidden = output if isinstance(output, Tensor) else output[0]
    assert isinstance(hidden, Tensor)
    return hidden


def _compensate(original: Tensor, output: Tensor, routed: list[Tensor], gain: float) -> list[Tensor]:
    """``routed + (original - output) / gain``, computed in float32 and rounded once, one ``[T, H]`` per micro-batch."""
    wanted, start = [], 0
    original_TH, output_TH = original.flatten(0, -2), output.flatten(0, -2)
    for routed_TH in routed:
        rows = slice(start, start + len(routed_TH))
        missing_TH = (original_TH[rows].float() - output_TH[rows].float()) / gain
        wanted.append((routed_TH.float() + missing_TH).to(routed_TH.dtype))
        start = rows.stop
    return wanted
