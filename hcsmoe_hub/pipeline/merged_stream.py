"""The inputs that a layer will see in the reduced model, and the outputs that are wanted from its experts there.

T tokens of the calibration sequences, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hcsmoe_hub.events import Listener, Warned
from hcsmoe_hub.layer.context import LayerContext
from hcsmoe_hub.machine import ranks
from hcsmoe_hub.model.experts import Experts
from hcsmoe_hub.model.microbatch import MicroBatcher, select
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
    """Finds what the blocks of a model are fitted to where that is what they will see in the reduced model.

    Args:
        batcher: Cuts the calibration sequences into micro-batches.
        emit: Called with warnings.
        compensates: Whether what blocks are fitted to makes up for what earlier layers have changed; the fit of a
            router does not look at outputs.

    Attributes:
        has_warned: Whether a layer that does more than add has been warned of.
    """

    def __init__(self, batcher: MicroBatcher, emit: Listener, *, compensates: bool) -> None:
        self._batcher = batcher
        self._emit = emit
        self._compensates = compensates
        self.has_warned = False
        self._silent: Any = None
        self._gain: float | None = None

    def wanted(
        self, layer: StreamedLayer, context: LayerContext, *, inputs: Call, output: Any, seen: Observation
    ) -> Observation:
        """What a block is fitted to.

        Its inputs are those of the reduced model. Its wanted routed outputs are ``(H - S) / g``: H is what leaves the
        layer in the source, and S what leaves it on the inputs of the reduced model if its experts return nothing; g
        is what the layer multiplies the routed output by before it is added to everything else. A block that returns
        them makes up for all that the layers before it have changed. Where the layer does anything but add, they are
        the outputs in the source. No expert runs for any of this.

        Args:
            layer: The layer, which has run on the source's inputs.
            context: The same for its MoE block.
            inputs: Its inputs in the reduced model.
            output: What it returned in the source, or the hidden states of that.
            seen: What was observed of it in the source; statistics and choices stay those.
        """
        moe, experts = context.source.moe, context.source.experts
        is_whole = context.block.is_whole_layer
        calls, silence = list[Call](), _Noise(0.0)

        def restart() -> None:
            calls.clear()
            silence.tokens.clear()

        with remembering_calls(moe, calls, layer.batcher.keep), experts.observing(moe, silence):
            self._silent = layer.run(inputs, restart)
        silent = hidden_of(self._silent)
        wanted, self._gain = seen.outputs, None
        if self._compensates:
            # Rounding on other sequences must not lead to another decision.
            self._gain = ranks.from_first(self._find_gain(layer, context.source, inputs=inputs, silent=silent))
            if self._gain is None:
                self._warn(layer.index)
            else:
                wanted = _missing(
                    hidden_of(output), silent, self._gain, tokens=silence.tokens, dtype=seen.outputs[0].dtype
                )
        return replace(seen, calls=[inputs] if is_whole else calls, outputs=wanted)

    def advance(self, reduced: RunnableBlock, calls: list[Call]) -> Any:
        """The output of the layer that ``wanted`` has seen, in the reduced model.

        Where the layer only adds what its experts return to everything else, only they run: ``S + g Y``.

        Args:
            reduced: Its block in the result.
            calls: Inputs of the block in the reduced model.

        Returns:
            The output; ``None`` if the layer has to run.
        """
        silent, self._silent = self._silent, None
        if silent is None or self._gain is None:
            return None
        hidden = hidden_of(silent)
        routed_TH = torch.cat(reduced.rerun(calls, RoutedObserver).outputs).to(hidden.device)
        found = (hidden.float() + self._gain * routed_TH.float().view_as(hidden)).to(hidden.dtype)
        return found if isinstance(silent, Tensor) else type(silent)((found, *silent[1:]))

    def _warn(self, layer: int) -> None:
        """Warns of the first layer that does more than add."""
        if not self.has_warned:
            self.has_warned = True
            self._emit(
                Warned(
                    f"layer {layer}: more than a sum lies between its experts and what leaves the layer, so what "
                    "earlier layers have changed is not made up for."
                )
            )

    def _find_gain(self, layer: StreamedLayer, block: RunnableBlock, *, inputs: Call, silent: Tensor) -> float | None:
        """What a layer multiplies the routed output by before it adds it; ``None`` if it does anything else.

        It runs on one micro-batch, its experts replaced by noise.
        """
        sequences = self._batcher.sequences
        rows = min(self._batcher.batch, sequences)
        args, kwargs = inputs.args, dict(inputs.kwargs)
        if rows < sequences:
            args, kwargs = (select(values, slice(0, rows), sequences) for values in (args, kwargs))
        expected = silent[:rows]
        noise = _Noise(float(expected.float().abs().median()) or 1.0)
        forward = partial(type(layer.module).forward, layer.module)
        batcher = self._batcher.sized(rows, rows)
        with block.experts.observing(block.moe, noise):
            loud = hidden_of(batcher.wrap(forward, lambda: None)(*args, **kwargs))
        return find_gain(loud, expected, noise.values_TH)


class _Noise:
    """Returns seeded noise in place of the routed output, its size different from token to token; of size 0, zeros.

    Attributes:
        tokens: Tokens of each micro-batch.
        values_TH: What was returned for the last one.
    """

    def __init__(self, size: float) -> None:
        self._size = size
        self.tokens: list[int] = []
        self.values_TH = torch.empty(0)

    def __call__(self, experts: Experts, tokens_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        self.tokens.append(len(tokens_TH))
        if not self._size:
            return torch.zeros_like(tokens_TH)
        generator = torch.Generator().manual_seed(0)
        size_T = torch.tensor(PROBE_SIZES).repeat(-(-len(tokens_TH) // len(PROBE_SIZES)))[: len(tokens_TH)]
        values_TH = self._size * size_T[:, None] * torch.randn(tokens_TH.shape, generator=generator)
        self.values_TH = values_TH.to(tokens_TH)
        return self.values_TH


def find_gain(loud: Tensor, silent: Tensor, values_TH: Tensor) -> float | None:
    """The number g for which ``loud = silent + g * values``, but for rounding; ``None`` if there is none.

    Args:
        loud: What leaves a layer whose experts return ``values_TH``.
        silent: What leaves it if they return nothing.
        values_TH: ``[T, H]``.
    """
    if loud.numel() != values_TH.numel():
        return None
    values, silent = values_TH.to(loud.device).flatten().double(), silent.to(loud.device)
    change = (loud.double() - silent.double()).flatten()
    gain = float(values @ change / (values @ values))
    unit = torch.finfo(loud.dtype).eps
    size = loud.flatten().abs().double() + silent.flatten().abs().double() + (gain * values).abs()
    is_exact = (change - gain * values).abs() <= MAX_ROUNDING * unit * size
    return gain if gain and float(is_exact.double().mean()) > 0.5 else None


def hidden_of(output: Any) -> Tensor:
    """The hidden states among what a layer returns."""
    hidden = output if isinstance(output, Tensor) else output[0]
    assert isinstance(hidden, Tensor)
    return hidden


def _missing(
    original: Tensor, silent: Tensor, gain: float, *, tokens: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    """``(original - silent) / gain``, computed in float32 and rounded once, one ``[T, H]`` per micro-batch."""
    missing, start = [], 0
    original_TH, silent_TH = original.to(silent.device).flatten(0, -2), silent.flatten(0, -2)
    for count in tokens:
        rows = slice(start, start + count)
        missing.append(((original_TH[rows].float() - silent_TH[rows].float()) / gain).to(dtype))
        start = rows.stop
    return missing
