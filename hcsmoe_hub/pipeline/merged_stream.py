"""The hidden states of the reduced model beside those of the source: what its layers will see, and are fitted on.

B sequences of S tokens, T = B * S tokens, H hidden size.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from hcsmoe_hub.events import Listener, Warned
from hcsmoe_hub.layer.reduced_block import load_reduced
from hcsmoe_hub.model.blocks import MoEBlock
from hcsmoe_hub.model.experts import Experts, Observer, observe, stop_observing
from hcsmoe_hub.model.layer_loader import free
from hcsmoe_hub.model.microbatch import MicroBatcher, join, select
from hcsmoe_hub.model.skeleton import Skeleton
from hcsmoe_hub.model.source_model import SourceModel
from hcsmoe_hub.observation.observers import RoutedObserver
from hcsmoe_hub.observation.statistics import Call
from hcsmoe_hub.observation.watcher import Observation

# Sizes of the noise that a layer is probed with, token by token: a norm behind the experts would make them equal.
PROBE_SIZES = (0.5, 1.0, 2.0)
# Rounding leaves a fraction of one unit in the last place; a norm, hundreds.
MAX_ROUNDING = 1.0


class MergedStream:
    """The second of two sets of hidden states that the model's own forward carries along.

    Every calibration sequence is in the model's batch twice, so whatever the model does between its layers it does to
    both: rows 0 to B - 1 are the source's, rows B to 2B - 1 the reduced model's. Until the first converted layer both
    are the same and nothing is computed twice.

    Args:
        model: The source.
        reduced: Skeleton of the result.
        batcher: Cuts the B sequences into micro-batches.
        emit: Called with warnings.
        compensates: Whether what blocks are fitted to makes up for what earlier layers have changed; the fit of a
            router does not look at outputs.

    Attributes:
        sequences: B.
    """

    def __init__(
        self, model: SourceModel, reduced: Skeleton, batcher: MicroBatcher, emit: Listener, *, compensates: bool
    ) -> None:
        self._model = model
        self._reduced = reduced
        self._batcher = batcher
        self._emit = emit
        self._compensates = compensates
        self.sequences = batcher.sequences
        self._rows = 2 * batcher.sequences
        self._is_apart = False
        self._has_warned = False
        self._args: tuple[Any, ...] = ()
        self._kwargs: Mapping[str, Any] = {}
        self._original: Any = None
        self._output: Any = None

    def double(self, token_ids: Tensor) -> Tensor:
        """The batch ``[2B, S]`` of both streams; one row more where a batch of 2B could not be told from S tokens."""
        self._rows = 2 * len(token_ids) + (2 * len(token_ids) == token_ids.shape[1])
        return torch.cat([token_ids, token_ids, token_ids])[: self._rows]

    def split(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Keeps the reduced model's part of a layer's inputs, and returns the source's."""
        first, second = slice(0, self.sequences), slice(self.sequences, 2 * self.sequences)
        self._args = select(args, second, self._rows)
        self._kwargs = select(dict(kwargs), second, self._rows)
        return select(args, first, self._rows), select(dict(kwargs), first, self._rows)

    def ran(self, output: Any) -> None:
        """The source's layer has run over its own part and returned ``output``."""
        self._original = output

    def join(self) -> Any:
        """The output of both streams, after ``advance``."""
        parts = [self._original, self._output]
        if self._rows > 2 * self.sequences:
            parts.append(select(self._original, slice(0, 1), self.sequences))
        self._original = self._output = None
        self._args, self._kwargs = (), {}
        return join(parts)

    def observe(self, block: MoEBlock, seen: Observation) -> Observation:
        """What a block is fitted to.

        Its inputs are those of the reduced model. Its wanted routed outputs are ``Y + (H - H') / g``: Y is what the
        source's experts return on these inputs, H' what leaves the source's layer then, and H what leaves it in the
        source; g is what the layer multiplies the routed output by before it is added to everything else. A block that
        returns them makes up for all that the layers before it have changed. Where the layer does anything else than
        add, they are the outputs in the source.

        Args:
            block: The block; its layer's weights are in memory, and the layer has run on the source's inputs.
            seen: What was observed of it in the source; statistics and choices stay those.
        """
        if not self._is_apart:
            return seen
        layer, moe, experts = self._modules(block)
        gain = self._gain(layer, moe, experts) if self._compensates else None
        observers, calls = list[RoutedObserver](), list[Call]()

        def start() -> None:
            calls.clear()
            observers[:] = [RoutedObserver()]
            observe(moe, experts, observers[0])

        def remember(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(Call(send_to_device(args, "cpu"), send_to_device(kwargs, "cpu")))

        hook = moe.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            output = self._run(layer, start)
        finally:
            hook.remove()
            stop_observing(moe, experts)
        wanted = seen.outputs
        if gain is not None:
            wanted = _compensate(_hidden(self._original), _hidden(output), observers[0].outputs, gain)
        elif self._compensates and not self._has_warned:
            self._has_warned = True
            self._emit(
                Warned(
                    f"layer {block.layer}: more than a sum lies between its experts and what leaves the layer, so "
                    "what earlier layers have changed is not made up for."
                )
            )
        return Observation(statistics=seen.statistics, calls=calls, top_k=seen.top_k, outputs=wanted)

    def advance(self, layer: int, block: MoEBlock | None, changed: Mapping[str, Tensor]) -> None:
        """Takes the reduced model's hidden states through a layer.

        Args:
            layer: Its index; its weights are in memory, those of its experts not necessarily.
            block: Its MoE block if it was converted.
            changed: Tensors of the block in the result, by parameter name.
        """
        if block is None:
            module = self._model.skeleton.layers[layer]
            self._output = self._run(module, lambda: None) if self._is_apart else self._original
            return
        self._is_apart = True
        module, moe, _ = self._modules(block)
        merged = load_reduced(self._model, self._reduced, block, changed, self._batcher.device)
        experts = self._reduced.module.get_submodule(block.experts_path)
        owner, _, name = block.path.rpartition(".")
        parent = self._model.skeleton.module.get_submodule(owner)
        setattr(parent, name, merged)
        try:
            self._output = self._run(module, lambda: observe(merged, experts, RoutedObserver()))
        finally:
            setattr(parent, name, moe)
            stop_observing(merged, experts)
        free(merged)

    def _modules(self, block: MoEBlock) -> tuple[nn.Module, nn.Module, nn.Module]:
        """A block's layer, the block itself and its experts, in the source."""
        model = self._model.skeleton.module
        layer = self._model.skeleton.layers[block.layer]
        return layer, model.get_submodule(block.path), model.get_submodule(block.experts_path)

    def _run(self, layer: nn.Module, start: Callable[[], None]) -> Any:
        # The layer's own forward: the one on the instance loads and frees its weights.
        return self._batcher.wrap(partial(type(layer).forward, layer), start)(*self._args, **self._kwargs)

    def _gain(self, layer: nn.Module, moe: nn.Module, experts: nn.Module) -> float | None:
        """What a layer multiplies the routed output by before it adds it; ``None`` if it does anything else.

        It runs on one micro-batch, its experts replaced first by nothing and then by noise.
        """
        rows = min(self._batcher.batch, self.sequences)
        batcher = MicroBatcher(rows, rows, self._batcher.device)
        args, kwargs = self._args, dict(self._kwargs)
        if rows < self.sequences:
            args, kwargs = (select(inputs, slice(0, rows), self.sequences) for inputs in (args, kwargs))

        def run(observer: Observer) -> Tensor:
            forward = batcher.wrap(partial(type(layer).forward, layer), lambda: observe(moe, experts, observer))
            try:
                return _hidden(forward(*args, **kwargs))
            finally:
                stop_observing(moe, experts)

        silent = run(_Noise(0.0))
        noise = _Noise(float(silent.float().abs().median()) or 1.0)
        return find_gain(run(noise), silent, noise.values_TH)


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
